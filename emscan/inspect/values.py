"""NaN and Inf in tensors, counted in the file's bytes: streamed, with bounded memory, for every dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from emscan.inspect.part import Entry, View
from emscan.inspect.reader import Reader
from emscan.load.source import RefusalError

_BLOCK = 1 << 24  # bytes in memory at a time
_BUDGET_FACTOR = 8
_BUDGET_FLOOR = 1 << 24
# dtype -> (bytes, bits of the exponent, bits of the mantissa) where all ones in the exponent mean NaN or Inf
_FLOATS = {
    "float64": (8, 11, 52), "float32": (4, 8, 23), "float16": (2, 5, 10), "bfloat16": (2, 8, 7), "float8_e5m2": (1, 5, 2),
}  # fmt: skip
_COMPLEX = {"complex64": "float32", "complex128": "float64", "complex32": "float16"}
# dtype -> the codes that mean NaN; none means Inf
_CODES = {
    "float8_e4m3fn": (0x7F, 0xFF), "float8_e4m3fnuz": (0x80,), "float8_e5m2fnuz": (0x80,), "float8_e8m0fnu": (0xFF,),
}  # fmt: skip
_ITEMS = {"bool": 1, "uint8": 1, "int8": 1}


def count_values(file: Reader, entries: list[Entry]) -> None:
    """Write into the entries of one file how many of their elements are NaN or infinite; integers have none.

    Raises RefusalError where the tensors present far more elements than the file has.
    """
    found: dict[Any, tuple[int, int]] = {}
    wanted = [entry for entry in entries if entry.view is not None]
    distinct = {entry.same if entry.same is not None else id(entry): entry.info.bytes or 0 for entry in wanted}
    if sum(distinct.values()) > max(_BUDGET_FLOOR, _BUDGET_FACTOR * file.size):
        raise RefusalError("its tensors repeat far less data, too often to count in", "leave --check-values out")
    for entry in wanted:
        key = entry.same if entry.same is not None else id(entry)
        if key not in found:
            found[key] = _count(file, entry)
        entry.info.nan, entry.info.inf = found[key]


def _count(file: Reader, entry: Entry) -> tuple[int, int]:
    dtype, view = entry.info.dtype or "", entry.view
    floats = _COMPLEX.get(dtype, dtype)
    if view is None or (floats not in _FLOATS and floats not in _CODES):
        return 0, 0
    item = (_FLOATS[floats][0] if floats in _FLOATS else 1) * (2 if dtype in _COMPLEX else 1)
    nan = inf = 0
    for codes, times in _blocks(file, view, item):
        more = _special(codes, floats, item, view.big)
        nan, inf = nan + times * more[0], inf + times * more[1]
    return nan, inf


def _special(data: Any, dtype: str, item: int, big: bool) -> tuple[int, int]:
    """Return how many of the elements in ``data``, bytes of shape (..., item), are NaN and how many infinite."""
    flat = np.ascontiguousarray(data).reshape(-1)
    if dtype in _CODES:
        return int(np.isin(flat, np.array(_CODES[dtype], dtype=np.uint8)).sum()), 0
    size, exponent, mantissa = _FLOATS[dtype]
    codes = flat.view(np.dtype(f"{'>' if big else '<'}u{size}")).reshape(-1, item // size)
    ones = ((1 << exponent) - 1) << mantissa
    # As the dtype's own integers: a Python integer of 64 bits would make int64 of them.
    special = (codes & codes.dtype.type(ones)) == ones
    fraction = (codes & codes.dtype.type((1 << mantissa) - 1)) != 0
    return int((special & fraction).any(axis=1).sum()), int((special & ~fraction).any(axis=1).sum())


def _blocks(file: Reader, view: View, item: int) -> Iterator[tuple[Any, int]]:
    """Yield the bytes of a tensor's elements, and how many times each stands in the tensor."""
    if math.prod(view.shape) == 0:
        return
    axes = [(size, stride) for size, stride in zip(view.shape, view.stride, strict=True) if size > 1]
    times = math.prod(size for size, stride in axes if stride == 0)
    axes = sorted(((size, stride) for size, stride in axes if stride), key=lambda axis: -axis[1])
    for start, count, shape, strides in _pieces(view.offset, axes, item):
        data = np.frombuffer(file.at(view.start + start * item, count * item), np.uint8)
        if data.size != count * item:
            raise RefusalError("its tensors claim more data than the file has", "copy or save it again")
        if shape is not None:
            steps = [*(stride * item for stride in strides), 1]
            data = np.lib.stride_tricks.as_strided(data, (*shape, item), steps, writeable=False)
        yield data, times


def _pieces(
    offset: int, axes: list[tuple[int, int]], item: int
) -> Iterator[tuple[int, int, list[int] | None, list[int]]]:
    """Yield start and count of ranges in elements that together hold a tensor, each small enough for memory.

    Shape and strides within the range follow where it holds other elements, too.
    """
    span = 1 + sum((size - 1) * stride for size, stride in axes)
    if _dense(axes):
        step = max(1, _BLOCK // item)
        for start in range(0, span, step):
            yield offset + start, min(step, span - start), None, []
    elif span * item <= _BLOCK:
        yield offset, span, [size for size, _ in axes], [stride for _, stride in axes]
    else:
        (size, stride), rest = axes[0], axes[1:]
        step = max(1, _BLOCK // (2 * stride * item))
        step = step if step < size else 1  # overlapping windows: smaller pieces, or this would never end
        for first in range(0, size, step):
            count = min(step, size - first)
            yield from _pieces(offset + first * stride, [(count, stride), *rest] if count > 1 else rest, item)


def _dense(axes: list[tuple[int, int]]) -> bool:
    """Whether the elements fill their range, each once, in whatever order of the axes."""
    expected = 1
    for size, stride in reversed(axes):
        if stride != expected:
            return False
        expected *= size
    return True
