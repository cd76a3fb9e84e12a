"""Runs any pickle on symbols and refuses nothing: to tell what is in a file that will not be loaded.

Whatever a pickle would import, call or build becomes an Instance that remembers what went into it. Nothing is
imported, nothing called; tensors are made only through the loader's own checks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from emscan.load.calls import CALLS, SCALARS, Global, Instance, Value, plain_key
from emscan.load.imports import python3_name
from emscan.load.pickles import Machine
from emscan.load.placeholders import Held
from emscan.load.source import RefusalError

CALLED, BUILT = "called", "built"


class Key:
    """A key of a dict that is no plain value, by its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Forgotten(list[Any]):
    """Hooks are counted by the strict machine; here they are only part of what there is."""

    def append(self, item: Any) -> None:
        """Keep nothing."""


class LenientMachine(Machine):
    """A Machine for every opcode and every name. ``uses``: how each name is used besides being imported."""

    opcodes: ClassVar[dict[bytes, Callable[[Machine], None]]] = {}  # filled below
    most = 1_000_000  # the structure of the largest models takes a tenth

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.uses: dict[str, set[str]] = {}
        self.limits.hooks = _Forgotten()

    def use(self, kind: Any, how: str) -> str:
        """Note that ``kind`` is called or built; returns its name."""
        name = (
            kind.name if isinstance(kind, Global) else kind.kind if isinstance(kind, Instance) else type(kind).__name__
        )
        if isinstance(kind, Global):
            self.uses.setdefault(name, set()).add(how)
        return name

    def text(self, layout: str) -> str:
        """Return a string that a number of bytes precedes."""
        return self.take(self.number(layout)).decode("utf-8", "surrogatepass")


def _import(machine: Any, module: Any, name: Any) -> None:
    if type(module) is not str or type(name) is not str:
        module, name = "", "an unknown name"
    full = python3_name(module, name)
    machine.names[full] = None
    machine.push(Global(full))


def _stack_import(machine: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    _import(machine, module, name)


def _new(machine: Any, extended: bool = False) -> None:
    keywords = machine.stack.pop() if extended else {}
    arguments, kind = machine.stack.pop(), machine.stack.pop()
    machine.push(Held(machine.use(kind, BUILT), (*_tuple(arguments), keywords) if keywords else _tuple(arguments)))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)


def _reduce(machine: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    made: Any = None
    check = CALLS.get(function.name) if isinstance(function, Global) else None
    if check is not None and type(arguments) is tuple:
        try:
            made = check(machine.limits, *arguments)
        except (RefusalError, TypeError, ValueError, KeyError, OverflowError):
            made = None
    if type(made) is Value and isinstance(function, Global):
        made = Held(function.name, arguments)  # a size or a device: what it is made of may be of interest
    if made is None:
        if isinstance(function, Global) and function.name == "copyreg._reconstructor" and _tuple(arguments):
            kind = _tuple(arguments)[0]
            machine.push(Held(machine.use(kind, BUILT), ()))
            return
        made = Held(machine.use(function, CALLED), _tuple(arguments))
    machine.push(made)


def _instantiate(machine: Any) -> None:
    """INST: a class named in the stream, its arguments since the last mark."""
    module, name = machine.line(), machine.line()
    arguments = tuple(machine.items())
    _import(machine, module, name)
    machine.push(Held(machine.use(machine.stack.pop(), CALLED), arguments))


def _object(machine: Any) -> None:
    kind, *arguments = machine.items()
    machine.push(Held(machine.use(kind, CALLED), tuple(arguments)))


def _build(machine: Any) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, Instance):
        target.built, target.state = True, state


def _set(machine: Any, pairs: list[Any]) -> None:
    target = machine.stack[-1]
    table = target.items if isinstance(target, Held) else target if isinstance(target, dict) else {}
    for index in range(0, len(pairs), 2):
        table[_key(pairs[index])] = pairs[index + 1]


def _key(key: Any) -> Any:
    try:
        return plain_key(key)
    except RefusalError:
        return Key(key)


def _extend(machine: Any, values: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is list:
        target.extend(values)
    elif isinstance(target, Held):
        target.values.extend(values)


def _persistent(machine: Any, identity: Any) -> None:
    made: Any = Value()
    if machine.storage is not None and type(identity) is tuple:
        try:
            made = machine.storage(identity)
        except RefusalError:
            if identity[:1] == ("module",) and len(identity) > 1:  # torch before 1.6: the class, then its source code
                made = identity[1]
    machine.push(made)


def _table(machine: Any) -> None:
    pairs = machine.items()
    machine.push({})
    _set(machine, pairs)


def _recall(machine: Any, index: int) -> None:
    machine.push(machine.memo[index])


def _remember(machine: Any, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _integer(text: str) -> Any:
    return {"00": False, "01": True}.get(text) if text in ("00", "01") else int(text)


def _quoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _pop(machine: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.items()


def _opaque(layout: str) -> Callable[[Any], None]:
    """EXT1 and its like: what the number stands for only the process that unpickles knows."""

    def handler(machine: Any) -> None:
        machine.push(Global(f"an extension with code {machine.number(layout)}"))

    return handler


def _frozen(machine: Any) -> None:
    machine.push(tuple(machine.items()))


_MORE: dict[bytes, Callable[[Any], None]] = {
    pickle.PROTO: lambda machine: machine.number("B"),
    pickle.FRAME: lambda machine: machine.number("<Q"),
    pickle.GLOBAL: lambda machine: _import(machine, machine.line(), machine.line()),
    pickle.STACK_GLOBAL: _stack_import,
    pickle.NEWOBJ: _new,
    pickle.NEWOBJ_EX: lambda machine: _new(machine, extended=True),
    pickle.REDUCE: _reduce,
    pickle.INST: _instantiate,
    pickle.OBJ: _object,
    pickle.BUILD: _build,
    pickle.BINPERSID: lambda machine: _persistent(machine, machine.stack.pop()),
    pickle.PERSID: lambda machine: _persistent(machine, machine.line()),
    pickle.APPEND: lambda machine: _extend(machine, [machine.stack.pop()]),
    pickle.APPENDS: lambda machine: _extend(machine, machine.items()),
    pickle.ADDITEMS: lambda machine: _extend(machine, machine.items()),
    pickle.SETITEM: lambda machine: _set(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS: lambda machine: _set(machine, machine.items()),
    pickle.POP: _pop,
    pickle.POP_MARK: lambda machine: machine.items() and None,
    pickle.DUP: lambda machine: machine.push(machine.stack[-1]),
    pickle.LIST: lambda machine: machine.push(machine.items()),
    pickle.DICT: _table,
    pickle.EMPTY_SET: lambda machine: machine.push([]),
    pickle.FROZENSET: _frozen,
    pickle.INT: lambda machine: machine.push(_integer(machine.line())),
    pickle.LONG: lambda machine: machine.push(int(machine.line().rstrip("L"))),
    pickle.LONG4: lambda machine: machine.push(pickle.decode_long(machine.take(machine.number("<I")))),
    pickle.FLOAT: lambda machine: machine.push(float(machine.line())),
    pickle.STRING: lambda machine: machine.push(_quoted(machine.line())),
    pickle.UNICODE: lambda machine: machine.push(machine.line()),
    pickle.SHORT_BINSTRING: lambda machine: machine.push(machine.take(machine.number("B")).decode("latin1")),
    pickle.BINSTRING: lambda machine: machine.push(machine.take(machine.number("<I")).decode("latin1")),
    pickle.SHORT_BINUNICODE: lambda machine: machine.push(machine.text("B")),
    pickle.BINUNICODE8: lambda machine: machine.push(machine.text("<Q")),
    pickle.SHORT_BINBYTES: lambda machine: machine.push(machine.take(machine.number("B"))),
    pickle.BINBYTES: lambda machine: machine.push(machine.take(machine.number("<I"))),
    pickle.BINBYTES8: lambda machine: machine.push(machine.take(machine.number("<Q"))),
    pickle.BYTEARRAY8: lambda machine: machine.push(machine.take(machine.number("<Q"))),
    pickle.NEXT_BUFFER: lambda machine: machine.push(Value()),
    pickle.READONLY_BUFFER: lambda _: None,
    pickle.EXT1: _opaque("B"),
    pickle.EXT2: _opaque("<H"),
    pickle.EXT4: _opaque("<I"),
    pickle.MEMOIZE: lambda machine: _remember(machine, len(machine.memo)),
    pickle.PUT: lambda machine: _remember(machine, int(machine.line())),
    pickle.GET: lambda machine: _recall(machine, int(machine.line())),
}
LenientMachine.opcodes = {**Machine.opcodes, **_MORE}


def plain(value: Any) -> bool:
    """Whether it is a value that a document can show."""
    return type(value) in SCALARS and type(value) is not bytes
