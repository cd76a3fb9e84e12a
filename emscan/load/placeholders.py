"""Runs a pickle on symbols as `pickles` does, with placeholders for the names that are not on the safe list.

A placeholder is what a foreign class or function would have made: it remembers what went into it, and nothing is
imported or called. All that concerns torch's own names stays checked as strictly as ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from emscan.load import pickles
from emscan.load.calls import Global, Instance, Value, plain_key, refuse
from emscan.load.imports import python3_name
from emscan.load.pickles import Machine, known
from emscan.load.source import RefusalError


class Held(Instance):
    """An object of a foreign class: ``arguments`` of the call, then ``items`` and ``values`` put into it."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(kind)
        self.arguments = arguments
        self.items: dict[Any, Any] = {}
        self.values: list[Any] = []


@dataclass(eq=False)
class Set(Value):
    """A set of plain values."""

    values: list[Any]


class PlaceholderMachine(Machine):
    """A Machine for which any name may stand. ``foreign``: those outside the safe list; ``called``: those it calls.

    ``sources``: whether classes come with their source code.
    """

    opcodes: ClassVar[dict[bytes, Callable[[Any], None]]] = {}  # filled below

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.foreign: dict[str, None] = {}
        self.called: set[str] = set()
        self.sources = False

    def name(self, name: str) -> None:
        """Push a name."""
        self.names[name] = None
        if not known(name):
            self.foreign[name] = None
        self.push(Global(name))

    def hold(self, kind: Any, arguments: Any) -> None:
        """Push the placeholder of what a foreign class or function makes of ``arguments``."""
        if type(arguments) is not tuple:
            refuse("it would call something with arguments that are no tuple")
        self.push(Held(kind.name, arguments))


def _is_foreign(machine: PlaceholderMachine, kind: Any) -> bool:
    return isinstance(kind, Global) and kind.name in machine.foreign


def _global(machine: PlaceholderMachine) -> None:
    machine.name(python3_name(machine.line(), machine.line()))


def _new(machine: PlaceholderMachine) -> None:
    if not _is_foreign(machine, machine.stack[-2]):
        Machine.opcodes[pickle.NEWOBJ](machine)
        return
    arguments, kind = machine.stack.pop(), machine.stack.pop()
    machine.hold(kind, arguments)


def _reduce(machine: PlaceholderMachine) -> None:
    function = machine.stack[-2]
    if isinstance(function, Global) and function.name == "builtins.set":
        arguments = machine.stack[-1]
        Machine.opcodes[pickle.REDUCE](machine)
        machine.stack[-1] = Set([value for values in arguments for value in values])
        return
    if not _is_foreign(machine, machine.stack[-2]):
        Machine.opcodes[pickle.REDUCE](machine)
        return
    arguments, function = machine.stack.pop(), machine.stack.pop()
    kind = arguments[0] if type(arguments) is tuple and arguments else None
    if function.name == "copyreg._reconstructor" and isinstance(kind, Global):  # how protocol 1 makes any object
        function = kind
    else:
        machine.called.add(function.name)
    machine.hold(function, arguments)


def _build(machine: PlaceholderMachine) -> None:
    target = machine.stack[-2]
    if not isinstance(target, Held):
        Machine.opcodes[pickle.BUILD](machine)
        return
    target.state = machine.stack.pop()
    target.built = True


def _set(machine: PlaceholderMachine, pairs: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, Held) and type(target) is not dict:
        pickles.set_items(machine, pairs)
        return
    table = target.items if isinstance(target, Held) else target
    for index in range(0, len(pairs), 2):
        key = pairs[index]
        table[key if isinstance(key, Instance) else plain_key(key)] = pairs[index + 1]


def _extend(machine: PlaceholderMachine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Held):
        target.values.extend(values)
    else:
        pickles.extend(machine, values)


def _persistent(machine: PlaceholderMachine) -> None:
    identity = machine.stack[-1]
    if (
        type(identity) is tuple
        and identity[:1] == ("module",)
        and len(identity) > 1
        and isinstance(identity[1], Global)
    ):
        machine.sources = True  # torch before 1.6: a class, followed by its source code
        machine.stack[-1] = identity[1]
    else:
        Machine.opcodes[pickle.BINPERSID](machine)


PlaceholderMachine.opcodes = {
    **Machine.opcodes,
    pickle.GLOBAL: _global,
    pickle.NEWOBJ: _new,
    pickle.REDUCE: _reduce,
    pickle.BUILD: _build,
    pickle.BINPERSID: _persistent,
    pickle.APPEND: lambda machine: _extend(machine, [machine.stack.pop()]),
    pickle.APPENDS: lambda machine: _extend(machine, machine.items()),
    pickle.SETITEM: lambda machine: _set(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS: lambda machine: _set(machine, machine.items()),
}


class ModernMachine(PlaceholderMachine):
    """The same for protocols 4 and 5, in which torch.distributed writes its metadata."""


def _stack_global(machine: PlaceholderMachine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise RefusalError("its pickle names something that is no text")
    machine.name(python3_name(module, name))


def _memoize(machine: PlaceholderMachine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _text(layout: str) -> Callable[[PlaceholderMachine], None]:
    return lambda machine: machine.push(machine.take(machine.number(layout)).decode("utf-8", "surrogatepass"))


ModernMachine.opcodes = {
    **PlaceholderMachine.opcodes,
    pickle.PROTO: lambda machine: machine.number("B"),
    pickle.FRAME: lambda machine: machine.number("<Q"),
    pickle.STACK_GLOBAL: _stack_global,
    pickle.MEMOIZE: _memoize,
    pickle.SHORT_BINUNICODE: _text("B"),
    pickle.BINUNICODE8: _text("<Q"),
    pickle.SHORT_BINBYTES: lambda machine: machine.push(machine.take(machine.number("B"))),
    pickle.BINBYTES: lambda machine: machine.push(machine.take(machine.number("<I"))),
}
