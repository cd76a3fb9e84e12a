"""Where every axis of every value comes from: a dimension of a parameter, of an input, or computed positions.

A dimension is a tuple of factors (a merged dimension has several, row-major); a factor walks along one origin, and the
index into the origin is the sum of start + step * i over its factors. This is what makes "row 17 of
fc1.weight" survive reshapes, transposes, splits and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emscan.trace.graph import Call, Value

if TYPE_CHECKING:
    from emscan.trace.axes import Axes


@dataclass(frozen=True, slots=True)
class Origin:
    """What an axis is an axis of. ``persistent``: tied to parameters, so index k means the same in every sample."""

    id: int
    kind: str  # "param" | "buffer" | "input" | "const" | "call"
    name: str
    dim: int
    size: int
    persistent: bool = False
    position: bool = False  # places that a convolution or pooling has computed


@dataclass(frozen=True, slots=True)
class Factor:
    """``size`` steps along ``origin``. The index into it is the sum of start + step * i over all factors of the origin."""

    origin: Origin
    size: int
    step: int = 1
    start: int = 0


Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]
Rule = Callable[["Axes", Call], list[Dims] | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how operators carry axes from inputs to outputs."""

    def register(function: Rule) -> Rule:
        for name in names:
            if f"aten.{name}" in RULES:
                raise ValueError(f"{name} is registered twice")
            RULES[f"aten.{name}"] = function
        return function

    return register


def standing(value: Value) -> int:
    """Computed values name an axis before parameters do, and parameters before constants."""
    return 0 if value.data and value.param else 1 if value.data else 2 if value.param else 3


def reduced_axes(call: Call, rank: int) -> tuple[int, ...]:
    """Return the non-negative axes that a reduction removes."""
    dim = call.arg("dim")
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))) if rank else ()


def is_binary_extremum(call: Call) -> bool:
    """Whether ``max``/``min`` compares two tensors entry by entry rather than reducing one."""
    return call.op in {"aten.max", "aten.min"} and call.arg("other") is not None


def is_persistent(dim: Dim) -> bool:
    """Whether every factor of a dimension is tied to parameters."""
    return bool(dim) and all(factor.origin.persistent for factor in dim)
