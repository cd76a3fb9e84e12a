"""How operators other than views carry axes from inputs to outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from emscan.trace.graph import Call, Value
from emscan.trace.origins import Dim, Dims, is_binary_extremum, is_persistent, reduced_axes, rule, standing

if TYPE_CHECKING:
    from emscan.trace.axes import Axes


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
    # where both have the axis, the one that is tied to parameters says what it is an axis of
    pairs = list(zip(a, b, strict=True))
    return tuple(q[0] if p[1] == 1 or (p[1] == q[1] and is_persistent(q[0])) else p[0] for p, q in pairs)


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
    for value, letters in sorted(zip(call.inputs, terms[0], strict=True), key=lambda pair: standing(pair[0])):
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
    shape = tuple(call.inputs[1].shape[2:])
    if set(shape) == {1} and x.shape[-spatial:] == call.out.shape[-spatial:]:  # each place by itself
        return (*lead, channels, *axes.of(x)[-spatial:])
    return (
        *lead,
        channels,
        *(axes.fresh(call.out.shape[d], call=call, dim=d, position=True) for d in range(rank - spatial, rank)),
    )


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
    dims = list(axes.of(min(parts, key=standing)))
    position = any(f.origin.position or f.origin.kind == "input" for d in joined for f in d)
    dims[dim] = axes.fresh(call.out.shape[dim], call=call, dim=dim, persistent=persistent, position=position)
    return [tuple(dims)]


@rule("stack")
def stack(axes: Axes, call: Call) -> list[Dims] | None:
    """A stacked axis is persistent if its entries come from different parameters (outputs of K experts)."""
    dim = call.arg("dim", 0) % len(call.out.shape)
    makers = {_nearest_parameters(value) for value in call.inputs}
    persistent = len(makers) == len(call.inputs) > 1 and all(makers)
    new = axes.fresh(call.out.shape[dim], call=call, dim=dim, persistent=persistent)
    dims = list(axes.of(min(call.inputs, key=standing)))
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
