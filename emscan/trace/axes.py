"""The axes of every value of a trace, found by one walk over its calls."""

from __future__ import annotations

import math

from emscan.trace import axis_rules, axis_views
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import pointwise
from emscan.trace.origins import RULES, Dim, Dims, Factor, Origin, standing

TABLES = (axis_rules, axis_views)  # importing them fills RULES


class Axes:
    """The dimensions of every value of a trace, found by one walk over its calls."""

    def __init__(self, trace: Trace) -> None:
        self._dims: dict[int, Dims] = {}
        self._leaves: dict[tuple[str, str, int, int], Origin] = {}
        self._count = 0
        for value in trace.values:
            if value.call is None:
                self._dims[value.id] = self._leaf(value)
        for call in trace.calls:
            found = self._outputs(call)
            for value, dims in zip(call.outputs, found, strict=True):
                self._dims[value.id] = dims

    def of(self, value: Value) -> Dims:
        """Return the dimensions of ``value``."""
        return self._dims[value.id]

    def fresh(self, size: int, *, call: Call, dim: int, persistent: bool = False, position: bool = False) -> Dim:
        """Return a dimension along an axis that ``call`` made."""
        if size == 1:
            return ()
        self._count += 1
        return (Factor(Origin(self._count, "call", f"{call.op}#{call.id}", dim, size, persistent, position), size),)

    def _leaf(self, value: Value) -> Dims:
        kind = value.leaf or "const"
        name = value.name or f"const#{value.id}"
        dims: list[Dim] = []
        for dim, size in enumerate(value.shape):
            if size == 1:
                dims.append(())
                continue
            spot = (kind, name, dim, size)
            if spot not in self._leaves:
                self._count += 1
                self._leaves[spot] = Origin(self._count, kind, name, dim, size, kind in {"param", "buffer"})
            dims.append((Factor(self._leaves[spot], size),))
        return tuple(dims)

    def _outputs(self, call: Call) -> list[Dims]:
        handler = RULES.get(call.op)
        found: list[Dims] | None = None
        if any(0 in value.shape for value in (*call.inputs, *call.outputs)):
            found = None  # an expert without a token: nothing to follow
        elif handler is not None:
            found = handler(self, call)
        elif pointwise(call.op):
            found = [self.broadcast(call, value) for value in call.outputs]
        if found is None:
            found = [self._guess(call, value) for value in call.outputs]
        found += [self._guess(call, value) for value in call.outputs[len(found) :]]  # what else a kernel hands out
        return [
            dims if _fits(dims, value.shape) else self._guess(call, value)
            for dims, value in zip(found, call.outputs, strict=True)
        ]

    def _guess(self, call: Call, value: Value) -> Dims:
        """Dimensions of like size at the same place in the first input of like rank; new ones elsewhere."""
        like = next((v for v in call.inputs if len(v.shape) == len(value.shape) and v.leaf != "param"), None)
        dims: list[Dim] = []
        for dim, size in enumerate(value.shape):
            same = like is not None and like.shape[dim] == size
            dims.append(self.of(like)[dim] if same and like is not None else self.fresh(size, call=call, dim=dim))
        return tuple(dims)

    def broadcast(self, call: Call, value: Value) -> Dims:
        """Dimensions of a point-wise result: of the operand that has more than one entry there."""
        rank = len(value.shape)
        operands = sorted(call.inputs, key=standing)
        dims: list[Dim] = []
        for dim, size in enumerate(value.shape):
            for operand in operands:
                own = dim - rank + len(operand.shape)
                if own >= 0 and operand.shape[own] == size:
                    dims.append(self.of(operand)[own])
                    break
            else:
                dims.append(self.fresh(size, call=call, dim=dim))
        return tuple(dims)


def _fits(dims: Dims, shape: tuple[int, ...]) -> bool:
    return len(dims) == len(shape) and all(
        math.prod(factor.size for factor in dim) == size for dim, size in zip(dims, shape, strict=True)
    )
