"""What range of numbers can reach a layer, by the operators before it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emscan.trace.graph import Value
from emscan.trace.operators import MAX_POOL, PASS, POOLING, SOFTMAX, VIEW


@dataclass(frozen=True)
class Range:
    """Every entry lies in [low, high]; ``simplex``: the entries along the last axis also sum to at most one."""

    low: float
    high: float
    simplex: bool = False


_KNOWN = {
    "aten.relu": Range(0.0, math.inf),
    "aten.relu6": Range(0.0, 6.0),
    "aten.sigmoid": Range(0.0, 1.0),
    "aten.hardsigmoid": Range(0.0, 1.0),
    "aten.tanh": Range(-1.0, 1.0),
    "aten.softsign": Range(-1.0, 1.0),
    "aten.softplus": Range(0.0, math.inf),
    "aten.exp": Range(0.0, math.inf),
    "aten.square": Range(0.0, math.inf),
    "aten.abs": Range(0.0, math.inf),
}


def range_of(value: Value, depth: int = 12) -> Range | None:
    """Return the range of a value; None where nothing bounds it."""
    call = value.call
    if call is None or depth == 0:
        return None
    if call.op in _KNOWN:
        return _KNOWN[call.op]
    if call.op in SOFTMAX - {"aten._safe_softmax"} and "log" not in call.op:  # that one hands out rows of zeros
        dim = call.arg("dim")
        last = isinstance(dim, int) and dim % max(1, len(value.shape)) == len(value.shape) - 1
        return Range(0.0, 1.0, simplex=last)
    if call.op in {"aten.clamp", "aten.hardtanh", "aten.clamp_min", "aten.clamp_max", "aten.clip"}:
        return _clamped(value)
    if call.op in VIEW or call.op in PASS or call.op in MAX_POOL or call.op in POOLING:
        inner = range_of(call.inputs[0], depth - 1)
        if inner is None or call.op == "aten.constant_pad_nd" or call.op == "aten.pad":
            return None
        # padding of an average counts as zeros; a reshape may break up what sums to one
        pads = call.op in POOLING
        low, high = (min(inner.low, 0.0), max(inner.high, 0.0)) if pads else (inner.low, inner.high)
        return Range(low, high, inner.simplex and call.op in PASS)
    return None


def _clamped(value: Value) -> Range | None:
    call = value.call
    assert call is not None
    low, high = call.arg("min", call.arg("min_val")), call.arg("max", call.arg("max_val"))
    low = low if isinstance(low, int | float) else -math.inf
    high = high if isinstance(high, int | float) else math.inf
    return Range(float(low), float(high)) if not (math.isinf(low) and math.isinf(high)) else None
