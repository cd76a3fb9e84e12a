"""Views: run the operator on a contiguous tensor without memory and read where its strides lead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from emscan.trace.graph import Call, Value, substitute
from emscan.trace.origins import Dim, Dims, Factor, rule

if TYPE_CHECKING:
    from emscan.trace.axes import Axes


@rule(
    *"view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t T mT mH numpy_T movedim".split(),
    *"moveaxis swapaxes swapdims select slice narrow chunk split split_with_sizes unsafe_chunk unsafe_split".split(),
    *"tensor_split unbind diagonal expand expand_as broadcast_to view_as reshape_as hsplit vsplit unfold ravel".split(),
    *"adjoint matrix_H squeeze_copy unsafe_split_with_sizes alias".split(),
)
def view_like(axes: Axes, call: Call) -> list[Dims] | None:
    """Any view of a contiguous tensor is strides and an offset."""
    source = call.inputs[0]

    def stand_in(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        return leaf

    with torch.inference_mode(False), torch.no_grad():
        out = call.func(*substitute(call.args, stand_in), **substitute(call.kwargs, stand_in))
    flat = _flat(axes.of(source))
    results = []
    for view in [out] if isinstance(out, torch.Tensor) else list(out):
        digits = [(int(view.storage_offset()) // stride) % factor.size for factor, stride in flat]
        starts = [f.start + f.step * digit for (f, _), digit in zip(flat, digits, strict=True)]
        pieces: list[list[_Piece] | None] = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            pieces.append(_decode(flat, digits, int(size), int(stride)) if size > 1 and stride > 0 else None)
        _drop(flat, starts, pieces)
        results.append(tuple(_dim(axes, call, d, int(view.shape[d]), flat, starts, p) for d, p in enumerate(pieces)))
    return results


# (which factor, how many steps, how long a step in the factor's own index)
_Piece = tuple[int, int, int]


def _flat(dims: Dims) -> list[tuple[Factor, int]]:
    """Return the factors with their strides in the contiguous layout, outermost first."""
    factors = [factor for dim in dims for factor in dim]
    stride, found = 1, []
    for factor in reversed(factors):
        found.append((factor, stride))
        stride *= factor.size
    return found[::-1]


def _decode(flat: list[tuple[Factor, int]], digits: list[int], size: int, stride: int) -> list[_Piece] | None:
    """Return the factors that ``size`` steps of ``stride`` walk along, outermost first."""
    pieces: list[_Piece] = []
    for place in reversed(range(len(flat))):
        factor, unit = flat[place]
        if size == 1:
            break
        if not unit <= stride < unit * factor.size:
            continue
        if stride % unit:
            return None
        step = stride // unit
        room = -(-(factor.size - digits[place]) // step)
        taken = size if size <= room else factor.size // step
        if size > room and (factor.size % step or size % taken):
            return None
        pieces.append((place, taken, step))
        size //= taken
        stride = unit * factor.size
    return pieces[::-1] if size == 1 else None


def _drop(flat: list[tuple[Factor, int]], starts: list[int], pieces: list[list[_Piece] | None]) -> None:
    """Hand the constant index of a factor that a view has left to what remains of the same origin."""
    used = [place for dim in pieces for place, _, _ in dim or []]
    for place, (factor, _) in enumerate(flat):
        heir = next((p for p in used if flat[p][0].origin == factor.origin), None)
        if place not in used and heir is not None:
            starts[heir] += starts[place]


def _dim(
    axes: Axes, call: Call, dim: int, size: int, flat: list[tuple[Factor, int]], starts: list[int],
    pieces: list[_Piece] | None,
) -> Dim:  # fmt: skip
    if pieces is None:
        return axes.fresh(size, call=call, dim=dim)
    found = []
    for place, taken, step in pieces:
        factor = flat[place][0]
        found.append(Factor(factor.origin, taken, factor.step * step, starts[place]))
        starts[place] = 0  # a factor that a view splits carries its start once
    return tuple(found)
