"""The header of a safetensors file, read by hand: the tensors' bytes stay on the disk, and nothing in it is believed.

Accepts what the safetensors library accepts and refuses besides: a key that comes twice, of which two readers may take
different ones. Entry by entry, so that a header of 100 MB of brackets makes no hundred million lists.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from emscan.load.calls import DAMAGED
from emscan.load.source import RefusalError, printable

MOST = 100_000_000  # bytes of a header, as the safetensors library has it

# dtype of the format -> (torch's name, bits per element)
DTYPES = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "I16": ("int16", 16), "U16": ("uint16", 16),
    "I32": ("int32", 32), "U32": ("uint32", 32), "I64": ("int64", 64), "U64": ("uint64", 64),
    "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F32": ("float32", 32), "F64": ("float64", 64),
    "C64": ("complex64", 64), "F8_E5M2": ("float8_e5m2", 8), "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn", 4), "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6),
}  # fmt: skip
_STRING = r'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_KEY = re.compile(rf"\s*({_STRING})\s*:\s*", re.DOTALL)
_ENTRY = re.compile(r"\{[^{}]{0,4096}+\}")
_TEXTS = re.compile(rf"\{{\s*(?:{_STRING}\s*:\s*{_STRING}\s*,?\s*)*+\}}", re.DOTALL)
_NEXT = re.compile(r"\s*([,}])")
_EMPTY = re.compile(r"\s*\}")
_LARGEST = 2**63


class Readable(Protocol):
    """A file, or the bytes of one."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def at(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``."""


@dataclass(frozen=True)
class Loaded:
    """A file whose bytes are in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.data)

    def at(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``."""
        return self.data[offset : offset + count]


@dataclass(slots=True)
class Span:
    """One tensor of the file: ``start`` and ``end`` are offsets in the file."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int


@dataclass
class Header:
    """The tensors in the order of their bytes, and ``__metadata__``."""

    tensors: list[Span] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(file: Readable) -> Header:
    """Return what the header says; raises RefusalError where the safetensors library would refuse the file, too."""
    length = header_length(file.at(0, 8), file.size)
    try:
        header = _parsed(file.at(8, length).decode("utf-8"), 8 + length)
        _check_layout(header, 8 + length, file.size)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = printable(error, 120) if type(error) is ValueError else type(error).__name__
        raise RefusalError(f"its header is malformed ({what})", DAMAGED) from None
    return header


def header_length(head: bytes, size: int) -> int:
    """Return the length that the first bytes of a file of ``size`` bytes claim for its header."""
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise RefusalError(f"its header claims {length:,} bytes, more than the file has", DAMAGED)
    if length > MOST:
        raise RefusalError(
            f"its header claims {length:,} bytes, more than the {MOST:,} that the format allows", DAMAGED
        )
    return length


def _parsed(text: str, base: int) -> Header:
    if not text.startswith("{"):
        raise ValueError("it is no JSON object")
    header = Header()
    seen: set[str] = set()
    position = 1
    if _EMPTY.match(text, position):
        position = text.index("}", position) + 1
    else:
        separator = ","
        while separator == ",":
            key, position = _key(text, position, seen)
            pattern = _TEXTS if key == "__metadata__" else _ENTRY
            found = pattern.match(text, position)
            if found is None:
                raise ValueError(f"the value of {printable(key, 60)!r} at character {position} is not as it must be")
            value = _DECODER.decode(found[0])
            if key == "__metadata__":
                header.metadata = value
            else:
                header.tensors.append(_span(key, value, base))
            after = _NEXT.match(text, found.end())
            if after is None:
                raise ValueError(f"it is no JSON at character {found.end()}")
            separator, position = after[1], after.end()
    if text[position:].strip(" \t\r\n"):
        raise ValueError("its JSON is followed by other characters")
    header.tensors.sort(key=lambda span: (span.start, span.end))
    return header


def _key(text: str, position: int, seen: set[str]) -> tuple[str, int]:
    found = _KEY.match(text, position)
    if found is None:
        raise ValueError(f"it is no JSON at character {position}")
    key = json.loads(found[1]) if "\\" in found[1] else found[1][1:-1]
    if key in seen:
        raise ValueError(f"the key {printable(key, 60)!r} comes twice")
    seen.add(key)
    return key, found.end()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key comes twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _span(name: str, entry: dict[str, Any], base: int) -> Span:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    shown = printable(name, 60)
    if dtype not in DTYPES:
        raise ValueError(f"{shown!r} has the unknown dtype {printable(dtype, 20)!r}")
    whole = type(shape) is list and type(offsets) is list and len(offsets) == 2
    if not whole or not all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, *offsets)):
        raise ValueError(f"the shape or the offsets of {shown!r} are no sizes")
    bits = math.prod(shape) * DTYPES[dtype][1]
    if math.prod(size for size in shape if size) >= _LARGEST:
        raise ValueError(f"{shown!r} has an absurd shape")
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise ValueError(f"{shown!r} takes {bits / 8:,.10g} bytes, its offsets say {offsets[1] - offsets[0]:,}")
    return Span(name, dtype, shape, base + offsets[0], base + offsets[1])


def _check_layout(header: Header, start: int, size: int) -> None:
    """Require that the tensors lie one after another and fill the file."""
    for span in header.tensors:
        if span.start != start:
            what = "overlaps another" if span.start < start else "leaves bytes before it that belong to no tensor"
            raise ValueError(f"{printable(span.name, 60)!r} {what}")
        start = span.end
    if start > size:
        raise RefusalError(f"its tensors need {start - size:,} bytes more than the file has", DAMAGED)
    if start < size:
        raise RefusalError(f"its last {size - start:,} bytes belong to no tensor", DAMAGED)
