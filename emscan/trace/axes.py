"""Where every axis of every value comes from: a dimension of a parameter, of an input, or computed positions.

A dimension is a tuple of factors (a merged dimension has several, row-major); a factor walks along one origin, and the
index into the origin is the sum of start + step * i over its factors. This is what makes "row 17 of
fc1.weight" survive reshapes, transposes, splits and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from emscan.trace.graph import Call, Trace, Value, substitute
from emscan.trace.operators import pointwise


@dataclass(frozen=True, slots=True)
class Origin:
    """What an axis is an axis of. ``persistent``: tied to parameters, so index k means the same in every sample."""

    id: int
    kind: str  # "param" | "buffer" | "input" | "const" | "call"
    name: str
    dim: int
    size: int
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class Factor:
    """``size`` steps along ``origin``. The index into it is the sum of start + step * i over all factors of the origin."""

    origin: Origin
    size: int
    step: int = 1
    start: int = 0

    @property
    def whole(self) -> bool:
        """Whether the factor covers its whole origin in order."""
        return self.step == 1 and self.start == 0 and self.size == self.origin.size


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

    def fresh(self, size: int, *, call: Call, dim: int, persistent: bool = False) -> Dim:
        """Return a dimension along an axis that ``call`` made."""
        if size == 1:
            return ()
        self._count += 1
        return (Factor(Origin(self._count, "call", f"{call.op}#{call.id}", dim, size, persistent), size),)

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
        operands = sorted(call.inputs, key=_standing)
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


def _standing(value: Value) -> int:
    """Computed values name an axis before parameters do, and parameters before constants."""
    return 0 if value.data and value.param else 1 if value.data else 2 if value.param else 3


def _fits(dims: Dims, shape: tuple[int, ...]) -> bool:
    return len(dims) == len(shape) and all(
        math.prod(factor.size for factor in dim) == size for dim, size in zip(dims, shape, strict=True)
    )


# ---- views: run the operator on a contiguous tensor without memory and read its strides -------
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


# ---- operators that keep the shape, drop or replace an axis -------------------------------------
@rule(
    *"contiguous clone to _to_copy detach alias_copy type_as float half double bfloat16 dropout alpha_dropout".split(),
    *"feature_dropout softmax _softmax log_softmax _log_softmax layer_norm batch_norm group_norm instance_norm".split(),
    *"rms_norm native_layer_norm native_batch_norm cumsum cumprod logcumsumexp masked_fill scatter scatter_add".split(),
    *"index_add index_copy index_fill index_put masked_scatter tril triu copy cummax cummin prelu".split(),
    *"scatter_reduce rrelu lift_fresh special_log_softmax special_softmax log_sigmoid _fused_rms_norm".split(),
)
def same_as_first(axes: Axes, call: Call) -> list[Dims] | None:
    """The result has the axes of the first argument (of the source, for a whole copy or fill into a blank)."""
    first = call.inputs[0]
    if call.op == "aten.copy" and len(call.inputs) > 1 and call.inputs[1].shape == first.shape:
        first = call.inputs[1]
    found = axes.of(first)
    return [found if value.shape == first.shape else axes.broadcast(call, value) for value in call.outputs]


@rule("flip", "roll")
def reordered(axes: Axes, call: Call) -> list[Dims] | None:
    """An axis whose entries change places keeps its kind but no longer its indices."""
    moved = call.arg("dims") or range(len(call.out.shape))
    gone = {d % len(call.out.shape) for d in moved}
    dims = axes.of(call.inputs[0])
    return [
        tuple(
            axes.fresh(call.out.shape[d], call=call, dim=d, persistent=is_persistent(dim)) if d in gone else dim
            for d, dim in enumerate(dims)
        )
    ]


def reduced_axes(call: Call, rank: int) -> tuple[int, ...]:
    """Return the non-negative axes that a reduction removes."""
    dim = call.arg("dim")
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))) if rank else ()


@rule(
    *"sum mean amax amin max min argmax argmin prod logsumexp var std any all norm linalg_vector_norm median".split(),
    *"nanmedian mode var_mean std_mean count_nonzero nansum nanmean aminmax kthvalue special_logsumexp".split(),
)
def reduction(axes: Axes, call: Call) -> list[Dims] | None:
    """Reduced axes go; with keepdim they stay with one entry."""
    source = call.inputs[0]
    if is_binary_extremum(call):
        return [axes.broadcast(call, value) for value in call.outputs]
    gone = reduced_axes(call, len(source.shape))
    results = []
    for value in call.outputs:
        if len(value.shape) == len(source.shape):
            results.append(tuple(() if d in gone else dim for d, dim in enumerate(axes.of(source))))
        else:
            results.append(tuple(dim for d, dim in enumerate(axes.of(source)) if d not in gone))
    return results


def is_binary_extremum(call: Call) -> bool:
    """Whether ``max``/``min`` compares two tensors entry by entry rather than reducing one."""
    return call.op in {"aten.max", "aten.min"} and call.arg("other") is not None


@rule("topk", "sort", "argsort", "msort")
def ranking(axes: Axes, call: Call) -> list[Dims] | None:
    """The ranked axis loses its identity."""
    source = call.inputs[0]
    dim = call.arg("dim", -1)
    dim = (-1 if dim is None else dim) % max(1, len(source.shape))
    new = axes.fresh(call.out.shape[dim] if call.out.shape else 1, call=call, dim=dim)
    return [tuple(new if d == dim else old for d, old in enumerate(axes.of(source))) for _ in call.outputs]


# ---- contractions -------------------------------------------------------------------------------
@rule("linear")
def linear(axes: Axes, call: Call) -> list[Dims] | None:
    """(..., in) x (out, in) -> (..., out)."""
    x, weight = call.inputs[:2]
    return [(*axes.of(x)[:-1], *axes.of(weight)[:-1])]


@rule("matmul", "mm", "bmm", "mv", "dot", "inner_product")
def matmul(axes: Axes, call: Call) -> list[Dims] | None:
    """Torch's matmul rules: batch axes broadcast, the last of a meets the second to last of b."""
    a, b = call.inputs[:2]
    return [_product(axes, a, b)]


@rule("addmm", "baddbmm", "addbmm", "addmv")
def add_matmul(axes: Axes, call: Call) -> list[Dims] | None:
    """Bias first, then the two factors."""
    return [_product(axes, call.inputs[1], call.inputs[2])]


def _product(axes: Axes, a: Value, b: Value) -> Dims:
    left, right = axes.of(a), axes.of(b)
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    batch = _broadcast_dims(left[:-2], a.shape[:-2], right[:-2], b.shape[:-2])
    return (*batch, *rows, *columns)


def _broadcast_dims(left: Dims, left_shape: Iterable[int], right: Dims, right_shape: Iterable[int]) -> Dims:
    a, b = [*zip(left, left_shape, strict=True)], [*zip(right, right_shape, strict=True)]
    rank = max(len(a), len(b))
    a, b = [((), 1)] * (rank - len(a)) + a, [((), 1)] * (rank - len(b)) + b
    return tuple(p[0] if p[1] != 1 else q[0] for p, q in zip(a, b, strict=True))


def einsum_terms(call: Call) -> tuple[list[str], str] | None:
    """Return the letters of every operand and of the result, ellipses written out as capitals' neighbours; None if odd."""
    equation = str(call.arg("equation")).replace(" ", "")
    operands = call.inputs
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    spare = "αβγδεζηθικλμνξο"
    widths = [len(v.shape) - len(t.replace("...", "")) for t, v in zip(terms, operands, strict=True) if "..." in t]
    width = max(widths, default=0)
    if width > len(spare):
        return None
    expanded = []
    for term, value in zip(terms, operands, strict=True):
        own = len(value.shape) - len(term.replace("...", ""))
        expanded.append(term.replace("...", spare[width - own : width] if own else ""))
    if not arrow:
        letters = "".join(expanded)
        right = spare[:width] + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c not in spare))
    return expanded, right.replace("...", spare[:width])


@rule("einsum")
def einsum(axes: Axes, call: Call) -> list[Dims] | None:
    """Every letter of the result keeps the axis of the operand that has it, computed operands first."""
    terms = einsum_terms(call)
    if terms is None:
        return None
    known: dict[str, Dim] = {}
    for value, letters in sorted(zip(call.inputs, terms[0], strict=True), key=lambda pair: _standing(pair[0])):
        for letter, dim in zip(letters, axes.of(value), strict=True):
            if dim:
                known.setdefault(letter, dim)
    return [tuple(known.get(letter, ()) for letter in terms[1])]


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def convolution(axes: Axes, call: Call) -> list[Dims] | None:
    """(N, in, ...) * (out, in / groups, ...) -> (N, out, new positions)."""
    x, weight = call.inputs[:2]
    if call.arg("transposed", False):
        return transposed_convolution(axes, call)
    return [_with_positions(axes, call, x, axes.of(weight)[0])]


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(axes: Axes, call: Call) -> list[Dims] | None:
    """(N, in, ...) * (in, out / groups, ...) -> (N, out, new positions)."""
    x, weight = call.inputs[:2]
    grouped = call.arg("groups", 1) != 1
    channel_axis = -(len(weight.shape) - 1)
    channels = call.out.shape[channel_axis]
    dim = axes.fresh(channels, call=call, dim=1, persistent=True) if grouped else axes.of(weight)[1]
    return [_with_positions(axes, call, x, dim)]


def _with_positions(axes: Axes, call: Call, x: Value, channels: Dim) -> Dims:
    rank = len(call.out.shape)
    spatial = len(call.inputs[1].shape) - 2
    lead = axes.of(x)[: rank - spatial - 1]
    return (*lead, channels, *(axes.fresh(call.out.shape[d], call=call, dim=d) for d in range(rank - spatial, rank)))


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def pairwise_distance(axes: Axes, call: Call) -> list[Dims] | None:
    """(..., P, D) and (..., R, D) -> (..., P, R)."""
    a, b = call.inputs[:2]
    batch = _broadcast_dims(axes.of(a)[:-2], a.shape[:-2], axes.of(b)[:-2], b.shape[:-2])
    return [(*batch, axes.of(a)[-2], axes.of(b)[-2])]


@rule("scaled_dot_product_attention")
def attention(axes: Axes, call: Call) -> list[Dims] | None:
    """(..., L, E), (..., S, E), (..., S, V) -> (..., L, V)."""
    query, _, value = call.inputs[:3]
    return [(*axes.of(query)[:-1], axes.of(value)[-1])]


# ---- lookups and joins --------------------------------------------------------------------------
@rule("embedding")
def embedding(axes: Axes, call: Call) -> list[Dims] | None:
    """(rows, width), (...) -> (..., width)."""
    weight, index = call.inputs[:2]
    return [(*axes.of(index), axes.of(weight)[1])]


@rule("index")
def advanced_index(axes: Axes, call: Call) -> list[Dims] | None:
    """One integer index tensor in place of one axis; several adjacent ones broadcast."""
    source, indices = call.inputs[0], call.args[1]
    used = [(dim, index) for dim, index in enumerate(indices) if isinstance(index, Value)]
    if not used or any(index.dtype in {torch.bool, torch.uint8} for _, index in used):
        return None
    places = [dim for dim, _ in used]
    if places != list(range(places[0], places[-1] + 1)):
        return None
    widest = max((index for _, index in used), key=lambda v: (math.prod(v.shape), len(v.shape)))
    dims = axes.of(source)
    return [(*dims[: places[0]], *axes.of(widest), *dims[places[-1] + 1 :])]


@rule("index_select")
def index_select(axes: Axes, call: Call) -> list[Dims] | None:
    """The indexed axis becomes the index's own."""
    source, index = call.inputs[:2]
    dim = call.arg("dim", 0) % len(source.shape)
    new = axes.of(index)[0] if index.shape else ()
    return [tuple(new if d == dim else old for d, old in enumerate(axes.of(source)))]


@rule("gather", "take_along_dim")
def gather(axes: Axes, call: Call) -> list[Dims] | None:
    """Shape of the index; its own axis where it gathers, the source's elsewhere."""
    source, index = call.inputs[:2]
    if len(index.shape) != len(source.shape):
        return [axes.of(index)]
    dim = call.arg("dim", -1) % max(1, len(source.shape))
    pairs = zip(axes.of(source), axes.of(index), source.shape, index.shape, strict=True)
    return [tuple(i if d == dim or n != m else s for d, (s, i, n, m) in enumerate(pairs))]


@rule("cat", "concat", "concatenate")
def concatenate(axes: Axes, call: Call) -> list[Dims] | None:
    """A joined axis is persistent if all its parts are, or if one part is and the others are constants."""
    parts = [value for value in call.inputs if value.shape != (0,)]
    dim = call.arg("dim", 0) % len(call.out.shape)
    joined = [axes.of(value)[dim] for value in parts]
    persistent = all(is_persistent(d) or not d for d in joined) and any(joined)
    dims = list(axes.of(min(parts, key=_standing)))
    dims[dim] = axes.fresh(call.out.shape[dim], call=call, dim=dim, persistent=persistent)
    return [tuple(dims)]


@rule("stack")
def stack(axes: Axes, call: Call) -> list[Dims] | None:
    """A stacked axis is persistent if its entries come from different parameters (outputs of K experts)."""
    dim = call.arg("dim", 0) % len(call.out.shape)
    makers = {_nearest_parameters(value) for value in call.inputs}
    persistent = len(makers) == len(call.inputs) > 1 and all(makers)
    new = axes.fresh(call.out.shape[dim], call=call, dim=dim, persistent=persistent)
    dims = list(axes.of(min(call.inputs, key=_standing)))
    return [(*dims[:dim], new, *dims[dim:])]


def _nearest_parameters(value: Value, limit: int = 64) -> frozenset[str]:
    """Names of the parameters that enter first on the way back from ``value``."""
    layer = [value]
    for _ in range(limit):
        names = {v.name for call in (v.call for v in layer) if call for v in call.inputs if v.leaf == "param"}
        names |= {v.name for v in layer if v.leaf == "param"}
        if names:
            return frozenset(names)
        layer = [v for call in (v.call for v in layer) if call for v in call.inputs if v.param]
        if not layer:
            break
    return frozenset()


@rule("one_hot")
def one_hot(axes: Axes, call: Call) -> list[Dims] | None:
    """A new last axis whose index is the class."""
    source = call.inputs[0]
    return [(*axes.of(source), axes.fresh(call.out.shape[-1], call=call, dim=-1, persistent=True))]


def is_persistent(dim: Dim) -> bool:
    """Whether every factor of a dimension is tied to parameters."""
    return bool(dim) and all(factor.origin.persistent for factor in dim)
