"""Two-way competition inside a unit: sigmoid, tanh and what is built from them.

r_on = sigmoid(u) with u the log-odds of the two sides: u = z for sigmoid, SiLU, softplus; 2z for tanh;
1.702 z for quick-GELU; 2 sqrt(2/pi) (z + 0.044715 z^3) for the tanh form of GELU; log-odds of tanh(softplus(z)) for Mish.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from emscan.classify.curve import Curve, Function
from emscan.classify.site import GateForm

NAMES: dict[str, Function] = {
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "SiLU": F.silu,
    "Softplus": lambda z: F.softplus(z, threshold=1e9),
    "LogSigmoid": F.logsigmoid,
    "QuickGELU": lambda z: z * torch.sigmoid(1.702 * z),
    "GELU (tanh)": lambda z: F.gelu(z, approximate="tanh"),
    "Mish": F.mish,
    "Tanhshrink": F.tanhshrink,
}
# Operators that exponentiate and normalize two alternatives by themselves.
OPERATORS = frozenset(
    f"aten.{name}" for name in "sigmoid tanh softplus log_sigmoid silu mish special_expit logaddexp logaddexp2 ".split()
)
# The exponential from which a hand-written one is made.
EXPONENTIALS = frozenset(f"aten.{name}" for name in "exp exp2 expm1 pow cosh sinh special_exp2 special_expm1".split())


def recognize(curve: Curve, operators: set[str]) -> GateForm | None:
    """Return the form of a two-way log-sum-exp gate; None for anything else.

    The curve decides: its gate (value, slope or value over energy, brought to [0, 1]) has log-odds that are a line in
    z, or the known odd cubic, over the whole grid.
    """
    name = name_of(curve)
    if name is None and not operators & (OPERATORS | EXPONENTIALS):
        return None
    found = _log_odds(curve)
    if found is None:
        return None
    statistic, odds, mirror, ends = found
    label = name if name is not None else {"log-partition": "Softplus", "gate": "SiLU", "vector": "Sigmoid"}[statistic]
    if name is None and statistic == "vector" and curve.limits is not None and curve.limits[0] * curve.limits[1] < 0:
        label = "Tanh"
    statistic = _STATISTICS.get(label, statistic)
    return GateForm(label, curve.function, statistic, odds, mirror, ends)  # type: ignore[arg-type]


def name_of(curve: Curve) -> str | None:
    """Return the common name of a curve, None if it has none."""
    return next((name for name, function in NAMES.items() if curve.scaled(function)), None)


_STATISTICS = {"Tanh": "mean", "LogSigmoid": "log", "Softplus": "log-partition"}


def _log_odds(curve: Curve) -> tuple[str, Function, Function | None, tuple[float, float]] | None:
    if curve.same_as(F.mish):
        return "gate", _mish_odds, None, (0.0, 1.0)
    away = curve.z.abs() >= 1e-2
    z = curve.z[away]
    candidates = (
        ("vector", curve.z, curve.y, curve.limits if curve.slopes == (0.0, 0.0) or _settled(curve) else None),
        ("log-partition", curve.z, curve.slope, curve.slopes),
        ("gate", z, curve.y[away] / z, curve.slopes),
    )
    for statistic, where, gate, ends in candidates:
        if ends is None or abs(ends[1] - ends[0]) < 1e-9:
            continue
        law = _fit(where, (gate - ends[0]) / (ends[1] - ends[0]))
        if law is not None:
            offset, slope, cubic = law
            mirror = None if cubic and offset else _reflection(2 * offset / slope)
            on_off = (_nearest(ends[0]), _nearest(ends[1]))
            return statistic, _polynomial(offset, slope, cubic), mirror, on_off
    return None


def _settled(curve: Curve) -> bool:
    return curve.slopes is not None and max(map(abs, curve.slopes)) <= 1e-2 * max(curve.steepest, 1e-300)


def _nearest(number: float) -> float:
    """A limit read off far out, without the last share of its tail."""
    return round(number, 6)


def _fit(z: Tensor, p: Tensor) -> tuple[float, float, float] | None:
    """Fit log(p / (1 - p)) by b + a z + c z^3, return (b, a, c); None unless it fits to 1e-4 wherever p is in between."""
    inner = (p > 1e-6) & (p < 1 - 1e-6)
    everywhere, everything = z, p
    if int(inner.sum()) < 40:
        return None
    z, u = z[inner], torch.logit(p[inner])
    if float(z.max() - z.min()) <= 0:
        return None
    scale = float(z.abs().max())
    for columns in (2, 3):
        design = _design(z / scale, columns)
        solution = torch.linalg.lstsq(design, u[:, None]).solution[:, 0]
        residual = float((design @ solution - u).abs().max())
        if residual <= 1e-4 * max(1.0, float(u.abs().max())) and abs(float(solution[1])) > 1e-9:
            fitted = torch.sigmoid(_design(everywhere / scale, columns) @ solution)
            if float((fitted - everything).abs().max()) > 1e-4:
                continue  # a law that holds on one side only
            offset, slope = float(solution[0]), float(solution[1]) / scale
            cubic = float(solution[2]) / scale**3 if columns == 3 else 0.0
            rounded = [0.0 if abs(c) < 1e-7 else float(f"{c:.7g}") for c in (offset, slope, cubic)]
            return rounded[0], rounded[1], rounded[2]
    return None


def _design(z: Tensor, columns: int) -> Tensor:
    return torch.stack([torch.ones_like(z), z, z**3], 1)[:, :columns]


def _polynomial(offset: float, slope: float, cubic: float) -> Callable[[Tensor], Tensor]:
    def odds(z: Tensor) -> Tensor:
        if cubic:
            return z * (slope + cubic * z * z) + offset
        return z * slope + offset if offset else z if slope == 1.0 else z * slope

    return odds


def _reflection(shift: float) -> Function:
    return lambda z: -z - shift


def _mish_odds(z: Tensor) -> Tensor:
    # r = tanh(softplus(z)) = (e^2s - 1) / (e^2s + 1) with e^s = 1 + e^z, so r / (1 - r) = (e^2s - 1) / 2
    return torch.log(torch.expm1(2 * F.softplus(z, threshold=80.0))) - math.log(2.0)
