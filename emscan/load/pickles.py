"""Runs a checkpoint's pickle on symbols: finds out what unpickling it would do, and does none of it.

torch's own restricted unpickler calls any class that it may name, so that a REDUCE of `nn.Linear` would allocate
whatever the file asks for. Here every call is checked against a short table together with its arguments, layers may
only be rebuilt (NEWOBJ without arguments, then BUILD once), and tensors must fit the bytes that the file has for
them. The opcodes are those of torch's unpickler (protocol 2); any other is refused.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar

from emscan.load import allowlist
from emscan.load.calls import (
    CALLS,
    DAMAGED,
    HINT,
    TENSOR_TYPES,
    Global,
    Instance,
    Limits,
    Ordered,
    Storage,
    Value,
    plain_key,
    refuse,
)
from emscan.load.imports import imports, python3_name
from emscan.load.source import RefusalError, UnsafeError, listing, printable

_STEPS = 5_000_000  # opcodes; the structure of the largest models takes some 100,000


def check(
    data: bytes, position: int, storage: Callable[[Any], Storage], budget: int, make: type[Machine] | None = None
) -> Machine:
    """Return the machine, of the class ``make``, after running the pickle at ``position``.

    Where it refuses, the error names every import of the pickle outside the allowlist, if there is one.
    """
    machine = (make or Machine)(data, position, storage=storage, budget=budget)
    try:
        machine.run()
    except RefusalError:
        refused = [name for name in imports(data, position)[0] if not known(name)]
        if not refused:
            raise
        reason = f"unpickling it would import {listing(refused, 8)}, which is not on the safe list"
        raise UnsafeError(reason, HINT) from None
    return machine


def known(name: str) -> bool:
    """Whether a pickle may name it; what it may do with it is another question."""
    if name in CALLS or name in allowlist.ITEM_SIZES or name in TENSOR_TYPES:
        return True
    # These tables are torch's own: of another name they need not be asked, and torch need not be imported.
    return name.startswith("torch.") and any(
        name in table for table in (allowlist.dtypes(), allowlist.layers(), allowlist.functions())
    )


class Machine:
    """Executes one pickle on symbols.

    ``storage`` checks a persistent id and returns the Storage behind it. ``budget``: a tensor may present at most
    this many bytes, however few bytes it is a view of. Raises UnsafeError or RefusalError.
    """

    opcodes: ClassVar[dict[bytes, Callable[[Machine], None]]] = {}  # filled below
    most: ClassVar[int | None] = None  # instructions, where it is not the usual number

    def __init__(
        self, data: bytes, position: int = 0, *, storage: Callable[[Any], Storage] | None = None, budget: int = 0
    ) -> None:
        self.data = data
        self.position = position
        self.storage = storage
        self.limits = Limits(budget)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, None] = {}  # what it imports, in order
        self.result: Any = None

    def run(self) -> int:
        """Execute up to STOP and return the position after it; ``result`` is then the symbolic object."""
        try:
            for _ in range(self.most or _STEPS):
                code = self.take(1)
                if code == pickle.STOP:
                    break
                handler = self.opcodes.get(code)
                if handler is None:
                    refuse(f"its pickle uses opcode 0x{code.hex()}, which torch.save does not write")
                handler(self)
            else:
                refuse(f"its pickle has more than {self.most or _STEPS:,} instructions")
            (self.result,) = self.stack
        except (IndexError, KeyError, ValueError, TypeError, struct.error, OverflowError) as error:
            raise RefusalError(
                f"its pickle is malformed at byte {self.position} ({type(error).__name__})", DAMAGED
            ) from None
        if any(self.limits.hooks):
            refuse("it stores hooks on a tensor, which would run as code")
        return self.position

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        end = self.position + count
        if end > len(self.data):
            raise RefusalError("its pickle breaks off", DAMAGED)
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def line(self) -> str:
        """Return the text up to the next newline."""
        end = self.data.index(b"\n", self.position)
        piece = self.data[self.position : end]
        self.position = end + 1
        return piece.decode("utf-8")

    def number(self, layout: str) -> Any:
        """Return the next number of a struct layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def push(self, value: Any) -> None:
        """Push a value."""
        self.stack.append(value)

    def items(self) -> list[Any]:
        """Pop everything above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, count: int) -> None:
        """Replace the top ``count`` values by their tuple."""
        values = tuple(self.stack.pop() for _ in range(count))
        self.push(values[::-1])


# --- opcodes -----------------------------------------------------------------------------------------------------


def _mark(machine: Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _global(machine: Machine) -> None:
    name = python3_name(machine.line(), machine.line())
    if not known(name):
        refuse(f"unpickling it would import {printable(name)}, which is not on the safe list")
    machine.names[name] = None
    machine.push(Global(name))


def _new(machine: Machine) -> None:
    arguments, kind = machine.stack.pop(), machine.stack.pop()
    name = kind.name if isinstance(kind, Global) else type(kind).__name__
    if name not in allowlist.layers() or arguments != ():
        refuse(f"it would construct {printable(name)} with arguments of its own")
    machine.push(Instance(name))


def _reduce(machine: Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    name = function.name if isinstance(function, Global) else type(function).__name__
    check = CALLS.get(name)
    if check is None or type(arguments) is not tuple:
        refuse(f"it would call {printable(name)}, which loading a model never needs")
    machine.push(check(machine.limits, *arguments))


def _build(machine: Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if type(state) is not dict or not all(type(key) is str for key in state):
        refuse("it would set a state that is no plain dict of attributes")
    if isinstance(target, Ordered):
        # torch keeps the version numbers of a state_dict in this one attribute.
        if set(state) != {"_metadata"}:
            refuse("it would set attributes of an OrderedDict")
    elif isinstance(target, Instance) and not target.built:
        target.built = True  # a second BUILD could run a __setstate__ that the first one planted
        target.state = state
        _refuse_endless_state(target.kind, state)
    else:
        refuse("it would change the state of an object twice, or of one that is no layer")


def _refuse_endless_state(kind: str, state: dict[str, Any]) -> None:
    """Refuse the states of recurrent layers from which torch would rebuild names in a loop of the file's length."""
    if not kind.startswith("torch.nn.modules.rnn.") or kind.endswith(("Cell", "CellBase")):
        return
    names = state.get("_all_weights")
    first = names[0] if type(names) is list and names else None
    if "all_weights" in state or not (type(first) is list and first and type(first[0]) is str):
        refuse("its recurrent layer has the state of a torch before 1.0")


def set_items(machine: Machine, pairs: list[Any]) -> None:
    """Put keys and values, one after the other, into the dict on top of the stack."""
    target = machine.stack[-1]
    if type(target) is not dict and type(target) is not Ordered:
        refuse(f"it would set items of a {type(target).__name__.lower()}")
    for index in range(0, len(pairs), 2):
        target[plain_key(pairs[index])] = pairs[index + 1]


def extend(machine: Machine, values: list[Any]) -> None:
    """Append values to the list on top of the stack."""
    if type(machine.stack[-1]) is not list:
        refuse(f"it would append to a {type(machine.stack[-1]).__name__.lower()}")
    machine.stack[-1].extend(values)


def _persistent(machine: Machine) -> None:
    identity = machine.stack.pop()
    if machine.storage is None or type(identity) is not tuple:
        refuse("it refers to data outside its pickle in a way that torch.save does not")
    machine.push(machine.storage(identity))


def _remember(layout: str) -> Callable[[Machine], None]:
    def handler(machine: Machine) -> None:
        machine.memo[machine.number(layout)] = machine.stack[-1]

    return handler


def _recall(layout: str) -> Callable[[Machine], None]:
    return lambda machine: machine.push(machine.memo[machine.number(layout)])


def _number(layout: str) -> Callable[[Machine], None]:
    return lambda machine: machine.push(machine.number(layout))


def _protocol(machine: Machine) -> None:
    protocol = machine.number("B")
    if protocol != 2:
        refuse(f"it is written in pickle protocol {protocol}, which torch reads only unsafely")


Machine.opcodes = {
    pickle.PROTO: _protocol,
    pickle.GLOBAL: _global,
    pickle.NEWOBJ: _new,
    pickle.REDUCE: _reduce,
    pickle.BUILD: _build,
    pickle.BINPERSID: _persistent,
    pickle.APPEND: lambda machine: extend(machine, [machine.stack.pop()]),
    pickle.APPENDS: lambda machine: extend(machine, machine.items()),
    pickle.SETITEM: lambda machine: set_items(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS: lambda machine: set_items(machine, machine.items()),
    pickle.MARK: _mark,
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.items())),
    pickle.TUPLE1: lambda machine: machine.tuple_of(1),
    pickle.TUPLE2: lambda machine: machine.tuple_of(2),
    pickle.TUPLE3: lambda machine: machine.tuple_of(3),
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.EMPTY_TUPLE: lambda machine: machine.push(()),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.EMPTY_SET: lambda machine: machine.push(Value()),
    pickle.BININT: _number("<i"),
    pickle.BININT1: _number("B"),
    pickle.BININT2: _number("<H"),
    pickle.BINFLOAT: _number(">d"),
    pickle.LONG1: lambda machine: machine.push(pickle.decode_long(machine.take(machine.number("B")))),
    pickle.BINUNICODE: lambda machine: machine.push(
        machine.take(machine.number("<I")).decode("utf-8", "surrogatepass")
    ),
    pickle.SHORT_BINSTRING: lambda machine: machine.push(machine.take(machine.number("B")).decode("utf-8")),
    pickle.BINGET: _recall("B"),
    pickle.LONG_BINGET: _recall("<I"),
    pickle.BINPUT: _remember("B"),
    pickle.LONG_BINPUT: _remember("<I"),
}
