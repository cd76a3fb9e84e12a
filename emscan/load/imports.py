"""The names that a pickle would import, of any protocol: for messages. What may be loaded, `pickles` decides."""

from __future__ import annotations

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from itertools import islice

_STEPS = 5_000_000  # opcodes read at most, some seconds
_REMEMBER = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
_RECALL = ("GET", "BINGET", "LONG_BINGET")


def python3_name(module: str, name: str) -> str:
    """Return the full name of a global, with Python 2's modules renamed as every unpickler does."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def imports(data: bytes, start: int = 0) -> tuple[list[str], bool]:
    """Return every name that the pickle at ``start`` would import, and whether it ends as a pickle ends.

    Where the two parts of a name come from the stack (protocol 4) they are read from the strings pushed last;
    a stream that breaks off gives the names up to there.
    """
    names: dict[str, None] = {}
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    top: str | None = None  # what the last opcode pushed, where that was a string
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        for code, argument, _ in islice(pickletools.genops(stream), _STEPS):
            if code.name in _REMEMBER:
                memo[len(memo) if argument is None else int(argument)] = top
                continue
            top = None
            if code.name in ("GLOBAL", "INST"):
                names[python3_name(*str(argument).split(" ", 1))] = None
            elif code.name == "STACK_GLOBAL":
                names[python3_name(*strings[-2:])] = None
            elif code.name in _RECALL:
                top = memo.get(int(argument or 0))
            elif isinstance(argument, str):
                top = argument
            elif code.name == "STOP":
                return list(names), True
            if top is not None:
                strings = [*strings[-1:], top]
    except Exception:  # genops raises several types on a damaged stream
        pass
    return list(names), False
