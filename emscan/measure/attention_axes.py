"""Where heads, queries, keys and features lie in the tensors of an attention.

Heads are the axes that come from parameters and that queries and keys share, wherever they lie: merged into the batch,
split into groups that share keys, or absent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from emscan.classify.alternatives import projected
from emscan.classify.flow import ancestors, carries, computed, descendants
from emscan.classify.site import Site
from emscan.measure.layout import Layout, alternatives_last, split
from emscan.trace.axes import Axes
from emscan.trace.axis_rules import einsum_terms
from emscan.trace.graph import Call, Value
from emscan.trace.operators import CONTRACTION, PASS, pointwise
from emscan.trace.origins import Dim, Dims, Factor, is_persistent

Mark = tuple[int, int, int]
JOINS = frozenset({"aten.cat", "aten.concat", "aten.concatenate"})
WINDOWS = frozenset({"aten.unfold", "aten.as_strided", "aten.im2col", "aten.roll"})
PADS = frozenset({"aten.pad", "aten.constant_pad_nd"})


@dataclass(frozen=True)
class Lead:
    """Where the heads are among the leading axes of queries (..., L, E). ``layout``: None where they are at -3 alone."""

    layout: Layout | None
    single: bool  # none of the leading axes are heads

    @classmethod
    def of(cls, dims: Dims) -> Lead:
        """Find the heads of queries with these dimensions."""
        lead = dims[:-2]
        persistent = [[f.origin.persistent for f in dim] for dim in lead]
        if any(any(some) for some in persistent):
            elsewhere = any(any(some) for some in persistent[:-1]) or not all(persistent[-1])
            return cls(split(lead, lambda f: f.origin.persistent) if elsewhere else None, single=False)
        return cls(None, single=len(lead) < 2 or _of_input(lead[-1]))

    def heads_last(self, tensor: Tensor, rank: int) -> Tensor:
        """Return queries, keys, outputs or a mask (..., L, X) as (..., H, L, X); ``rank``: that of the queries."""
        if self.single:
            return tensor.unsqueeze(-3)
        if self.layout is None:
            return tensor
        axes = len(self.layout.pattern)
        tensor = tensor.reshape(*(1,) * (rank - tensor.dim()), *tensor.shape)
        sizes: list[int] = []
        place = 0
        for size, width in zip(tensor.shape[:axes], self.layout.pattern, strict=True):
            part = self.layout.shape[place : place + width]
            fixed = math.prod(s for s in part if s is not None)
            if size % fixed:  # broadcast, or heads that share their keys
                sizes += [1 if s is None or size == 1 else size for s in part]
            else:
                sizes += [size // fixed if s is None else s for s in part]
            place += width
        viewed = tensor.reshape(*sizes, *tensor.shape[axes:])
        heads = self.layout.unit_dims
        others = [a for a in range(len(sizes)) if a not in heads]
        viewed = viewed.permute(*others, *heads, len(sizes), len(sizes) + 1)
        first = len(others)
        return viewed.flatten(first, first + len(heads) - 1)


@dataclass(frozen=True)
class Spot:
    """Where heads, queries and the last axes (keys, or features of an output) are in a tensor."""

    layout: Layout
    query: int | None  # view axis
    last: tuple[int, ...]  # view axes
    own: bool  # key i belongs to query i
    heads: frozenset[Mark]
    ours: frozenset[Mark]  # of queries

    @classmethod
    def of(cls, dims: Dims, taken: tuple[int, ...], queries: Dim, alone: Dims) -> Spot:
        """Find them in scores with alternatives along ``taken``.

        ``queries``: the factors that only queries have; ``alone``: dimensions of scores without what is beside the keys.
        """
        rank = len(dims)
        keys = {axis % rank for axis in taken}
        ours = {_mark(f) for f in queries}
        rest = [f for d, dim in enumerate(dims) if d not in keys for f in dim]
        heads = frozenset(_mark(f) for f in rest if f.origin.persistent and _mark(f) not in ours)
        query = next((d for d, dim in enumerate(dims) if d not in keys and _marks(dim) & ours), None)
        if query is None:
            query = next((d for d in reversed(range(rank)) if d not in keys and not _all_in(dims[d], heads)), None)
        others = [d for d in range(rank) if d not in keys and d != query]
        if not heads and len(others) >= 2 and dims[others[-1]] and not _of_input(dims[others[-1]]):
            heads = frozenset(_marks(dims[others[-1]]))  # what experts have gathered: heads lie there by convention
        layout = split(dims, lambda f: _mark(f) in heads)
        own = query is not None and len(keys) == 1 and same_axis(dims[query], alone[next(iter(keys))])
        asked = ours or (_marks(dims[query]) - heads if query is not None else set())
        return cls(layout, _view_axis(layout, query), _view_axes(layout, keys), own, heads, frozenset(asked))

    def in_output(self, mixed: Mixed) -> Spot | None:
        """Find heads and features in posterior means; None where the heads cannot be told."""
        if self.heads - {_mark(f) for dim in mixed.dims for f in dim}:
            return None
        layout = split(mixed.dims, lambda f: _mark(f) in self.heads)
        left = [d for d, dim in enumerate(mixed.dims) if d not in mixed.features and not _all_in(dim, self.heads)]
        query = next((d for d in left if _marks(mixed.dims[d]) & self.ours), left[-1] if left else None)
        features = _view_axes(layout, set(mixed.features))
        return Spot(layout, _view_axis(layout, query), features, False, self.heads, self.ours)

    def heads_last(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (..., H, L, last)."""
        viewed = self.layout.view(tensor)
        heads = self.layout.unit_dims
        query = () if self.query is None else (self.query,)
        others = [a for a in range(viewed.dim()) if a not in {*heads, *query, *self.last}]
        sizes = [math.prod(viewed.shape[a] for a in some) for some in (heads, query)]
        rows = alternatives_last(viewed.permute(*others, *heads, *query, *self.last), tuple(range(-len(self.last), 0)))
        return rows.reshape(-1, *sizes, rows.shape[-1] if self.last else 1)


def _of_input(dim: Dim) -> bool:
    """Whether all of a dimension is places of the input, or computed places that pads and windows have made of them."""
    return bool(dim) and all(f.origin.kind == "input" or f.origin.position or _pads(f) for f in dim)


def _pads(factor: Factor) -> bool:
    return factor.origin.name.partition("#")[0] in PADS | WINDOWS


def _mark(factor: Factor) -> Mark:
    """What tells heads from the features inside them, which walk along the same axis of one weight."""
    return factor.origin.id, factor.step, factor.size


def _marks(dim: Dim) -> set[Mark]:
    return {_mark(factor) for factor in dim}


def _all_in(dim: Dim, marks: frozenset[Mark]) -> bool:
    return bool(dim) and all(_mark(f) in marks for f in dim)


def _view_axes(layout: Layout, dims: set[int]) -> tuple[int, ...]:
    """Return the axes of the view that dimensions of the tensor have become, heads left out."""
    starts = [sum(layout.pattern[:d]) for d in range(len(layout.pattern))]
    found = [a for d in sorted(dims) for a in range(starts[d], starts[d] + layout.pattern[d])]
    return tuple(a for a in found if a not in layout.unit_dims)


def _view_axis(layout: Layout, dim: int | None) -> int | None:
    axes = _view_axes(layout, {dim}) if dim is not None else ()
    return axes[-1] if axes else None


def same_axis(a: Dim, b: Dim) -> bool:
    """Whether two dimensions walk along the same axis of the input: a sequence that attends to itself."""
    return bool(a) and [f.origin.id for f in a] == [f.origin.id for f in b]


@dataclass(frozen=True)
class Beside:
    """Alternatives before and behind the keys that are none: sinks. ``scores``: those of the keys alone."""

    scores: Value
    before: int = 0
    behind: int = 0

    @classmethod
    def of(cls, site: Site, axes: Axes) -> Beside:
        """Find what a join or a pad has put beside the scores of the keys."""
        axis = site.axes[0]
        whole = cls(site.weights if site.weights is not None else site.energies)
        if len(site.axes) != 1:
            return whole
        for value in ancestors(site.energies, lambda call: pointwise(call.op) or call.op in PASS):
            if value.call is None or -axis > len(value.shape) or value.shape[axis] != site.energies.shape[axis]:
                continue
            if (found := cls._joined(value.call, axis, axes) or cls._padded(value.call, axis)) is not None:
                return found
        return whole

    @classmethod
    def _joined(cls, call: Call, axis: int, axes: Axes) -> Beside | None:
        rank = len(call.out.shape)
        if call.op not in JOINS or call.arg("dim", 0) % rank - rank != axis:
            return None
        parts = [v for v in call.inputs if v.shape != (0,)]
        along = [axes.of(v)[axis] for v in parts]  # of a sink nothing, or rows of the weight that computes it
        keys = [
            place for place, v in enumerate(parts) if computed(v) and along[place] and not is_persistent(along[place])
        ]
        if len(keys) != 1:
            return None
        sizes, place = [v.shape[axis] for v in parts], keys[0]
        return cls(parts[place], sum(sizes[:place]), sum(sizes[place + 1 :]))

    @classmethod
    def _padded(cls, call: Call, axis: int) -> Beside | None:
        if call.op not in PADS or axis != -1 or not computed(call.inputs[0]) or call.arg("value") == -math.inf:
            return None
        before, behind = call.arg("pad")[:2]
        return cls(call.inputs[0], before, behind) if min(before, behind) >= 0 and before + behind else None

    @property
    def sizes(self) -> tuple[int, int]:
        """How many there are before and behind."""
        return self.before, self.behind


def queries_of(site: Site, axes: Axes, scores: Value) -> Dim:
    """Return the factors of the axis that only the queries have, by the product that made the scores of the keys."""
    made = next((v.call for v in ancestors(scores, carries) if v.call and _of_both(v.call)), None)
    if made is None:
        return ()
    dims = axes.of(made.out)
    if made.op == "aten.einsum":
        return _einsum_queries(made, axes)
    if len(dims) < 2:
        return ()
    keys = _origins(scores, site.axes, axes)
    place = next((-3 - d for d in (-1, -2) if any(f.origin.id in keys for f in dims[d])), None)
    if made.out.shape != scores.shape:
        return dims[place] if place is not None else ()
    if place is None:  # a bias names the axes
        place = -3 - site.axes[0]
    return dims[place] + axes.of(scores)[place] if place in {-1, -2} else ()


def _of_both(call: Call) -> bool:
    """Whether a call is a product of queries and keys, not a layer on the way to a bias."""
    layer = call.op not in CONTRACTION or call.op == "aten.linear"
    return not layer and sum(computed(v) or projected(v) for v in call.inputs) >= 2


def _einsum_queries(made: Call, axes: Axes) -> Dim:
    """Axes that one operand alone has; those that come from the weight whose rows are contracted are heads still."""
    found = einsum_terms(made)
    if found is None or len(found[0]) != 2:
        return ()
    terms, out = found
    contracted = {
        f.origin.id
        for term, value in zip(terms, made.inputs, strict=True)
        for letter, dim in zip(term, axes.of(value), strict=True)
        if letter not in out
        for f in dim
        if f.origin.persistent
    }
    dims = axes.of(made.out)
    alone = [dims[place] for place, letter in enumerate(out) if (letter in terms[0]) != (letter in terms[1])]
    return tuple(
        f for dim in alone for f in dim if f.origin.id not in contracted
    )  # the keys, too: no heads in any case


@dataclass(frozen=True)
class Mixed:
    """A product of posterior and values. ``dims``: what its axes are in the posterior; ``features``: those of the values."""

    out: Value
    dims: Dims
    features: frozenset[int]


def posterior_mean(site: Site, axes: Axes) -> Mixed | None:
    """Return the product of the posterior and the values, or that of the weights where the division comes behind it."""
    keys = _origins(site.emitted, site.axes, axes)
    late = site.weights is not None and not keys & _origins(site.weights, site.weights_axes, axes)
    start = site.emitted
    if late and site.weights is not None:
        start, keys = site.weights, _origins(site.weights, site.weights_axes, axes)
    for user, operand in descendants(start, carries):
        factors = user.inputs[-2:]
        if user.op not in CONTRACTION or user.op == "aten.linear" or len(factors) < 2 or not operand.param:
            continue
        if any(v is operand for v in factors) and (found := _product(user, operand, axes, keys)) is not None:
            if not late:
                return found
            return replace(found, out=site.emitted) if found.out.shape == site.emitted.shape else None
    return None


def _origins(value: Value, along: tuple[int, ...], axes: Axes) -> set[int]:
    dims = axes.of(value)
    return {f.origin.id for axis in along if -axis <= len(dims) for f in dims[axis]}


def _product(call: Call, operand: Value, axes: Axes, keys: set[int]) -> Mixed | None:
    """Return a product that sums over the keys of a posterior, axes whose origins are ``keys``."""
    dims, rank, own = axes.of(operand), len(call.out.shape), len(operand.shape)
    left = call.inputs[-2] is operand
    if call.op == "aten.einsum":
        found = einsum_terms(call)
        if found is None or len(found[0]) != 2:
            return None
        term, out = found[0][0 if left else 1], found[1]
        gone = [dims[place] for place, letter in enumerate(term) if letter not in out]
        places = {d: term.index(letter) for d, letter in enumerate(out) if letter in term}
    elif min(own, rank, *(len(v.shape) for v in call.inputs[-2:])) < 2:
        return None
    else:
        gone = [dims[-1 if left else -2]]
        places = {d: d - rank + own for d in range(max(0, rank - own), rank - 2)}
        places[rank - 2 if left else rank - 1] = own - 2 if left else own - 1
    if not any(f.origin.id in keys for dim in gone for f in dim):
        return None
    same = tuple(dims[places[d]] if d in places else () for d in range(rank))
    features = set(range(rank)) - set(places)
    if call.op != "aten.einsum":  # leading axes that the values alone have are no features
        features &= {rank - 2, rank - 1}
    return Mixed(call.out, same, frozenset(features))
