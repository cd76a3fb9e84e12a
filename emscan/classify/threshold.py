"""Threshold gates: piecewise at a threshold, the zero-temperature limit of a two-way competition."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from emscan.classify.curve import Curve, Function
from emscan.classify.site import GateForm

NAMES: dict[str, Function] = {
    "ReLU": F.relu,
    "ReLU6": F.relu6,
    "Squared ReLU": lambda z: F.relu(z).square(),
    "LeakyReLU": F.leaky_relu,
    "ELU": F.elu,
    "SELU": F.selu,
    "Hardtanh": F.hardtanh,
    "Hardsigmoid": F.hardsigmoid,
    "Hardswish": F.hardswish,
    "Hardshrink": F.hardshrink,
    "Softshrink": F.softshrink,
    "Step": lambda z: (z > 0).double(),
    "Sign": torch.sign,
}


def recognize(curve: Curve) -> GateForm | None:
    """Return the form of a gate with a corner, a step, or an exactly straight side; None for anything else."""
    if not curve.kinked or curve.constant or not (curve.corners or curve.straight or curve.flat):
        return None
    flat = _flat_intervals(curve)
    switch = bool(flat) and all(low == -math.inf and high == math.inf for low, high in flat)
    if (switch or not flat) and not curve.two_sided:
        return None  # |z|, rounding and the like: no side is off
    names = [name for name, function in NAMES.items() if curve.scaled(function) or curve.scaled(_mirrored(function))]
    on_above = _threshold(curve, flat)
    if switch:  # a step passes no gradient on either side; what it multiplies is cut off below the threshold
        flat = [(-math.inf, on_above)]
    relu_like = len(flat) == 1 and flat[0][0] == -math.inf and _positive_exactly_above(curve, flat[0][1])
    return GateForm(
        names[0] if names else _general_name(curve, flat),
        curve.function,
        on_above=on_above,
        flat=tuple(flat),
        stuck=tuple(_value(curve.function, interval) for interval in flat),
        output_tells=relu_like,
    )


def _mirrored(function: Function) -> Function:
    return lambda z: function(-z)


def _flat_intervals(curve: Curve) -> list[tuple[float, float]]:
    """Return the flat intervals, their ends moved from the grid to the corner beside them."""
    corners = sorted({0.0 if abs(c) < 1e-3 else c for c in [*curve.corners, *_bends(curve)]})

    def snap(end: float) -> float:
        if math.isinf(end):
            return end
        near = min(corners, key=lambda c: abs(c - end), default=end)
        return _tidy(near) if abs(near - end) <= 0.02 * max(abs(end), 1e-2) else end

    found = [(snap(low), snap(high)) for low, high in curve.flat]
    merged: list[tuple[float, float]] = []
    for low, high in found:  # a grid without zero splits nothing, but a step at a corner touches on both sides
        if (
            merged
            and low <= merged[-1][1]
            and _value(curve.function, (low, high)) == _value(curve.function, merged[-1])
        ):
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged


def _bends(curve: Curve) -> list[float]:
    """Places where the slope leaves zero, to the precision of doubles."""
    still = curve.slope == 0
    before = (still[1:] != still[:-1]).nonzero()[:, 0]
    if not len(before):
        return []
    low, high, flat = curve.z[before], curve.z[before + 1], still[before]
    parts = torch.linspace(0, 1, 17, dtype=low.dtype)
    for _ in range(16):
        places = torch.lerp(low[:, None], high[:, None], parts)
        slope = curve._derivatives(places[:, 1:-1].flatten())[1].view(len(low), -1)
        kept = ((slope == 0) == flat[:, None]).cumprod(1).sum(1, keepdim=True)  # parts that are still as the low end is
        low, high = places.gather(1, kept)[:, 0], places.gather(1, kept + 1)[:, 0]
    return ((low + high) / 2).tolist()


def _tidy(number: float) -> float:
    """Round away what bisection leaves: 5.999999999 is 6."""
    rounded = float(f"{number:.7g}")
    return rounded if abs(rounded - number) <= 1e-7 * max(1.0, abs(number)) else number


def _value(function: Function, interval: tuple[float, float]) -> float:
    low, high = interval
    middle = high - 1.0 if math.isinf(low) else low + 1.0 if math.isinf(high) else (low + high) / 2
    return float(function(torch.tensor([middle], dtype=torch.float64))[0])


def _threshold(curve: Curve, flat: list[tuple[float, float]]) -> float:
    """Return where the upper side begins: the end of the lowest flat stretch, else the first corner."""
    if flat and math.isinf(flat[0][0]) and not math.isinf(flat[0][1]):
        return flat[0][1]
    if flat and not math.isinf(flat[0][1]):
        return flat[0][1]
    corners = [0.0 if abs(c) < 1e-6 else _tidy(c) for c in curve.corners]
    return min(corners, key=abs, default=0.0)


def _positive_exactly_above(curve: Curve, edge: float) -> bool:
    above = curve.z > edge
    zero_below = bool((curve.y[~above] == 0).all())
    return zero_below and bool((curve.y[above] > 0).all()) and bool((curve.slope[above] != 0).all())


def _general_name(curve: Curve, flat: list[tuple[float, float]]) -> str:
    if curve.slopes and not flat and curve.slopes[1] == 1.0 and 1e-3 < abs(curve.slopes[0]) < 1:
        return "LeakyReLU"
    if len(flat) >= 2 and math.isinf(flat[0][0]) and math.isinf(flat[-1][1]):
        return "Clip"
    return "Threshold"
