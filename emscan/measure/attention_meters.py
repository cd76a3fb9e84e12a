"""From attention sites to accumulators, one per head: attention in one operator, and softmax over scores written out.

Heads are the axes that come from parameters and that queries and keys share, wherever they lie: merged into the batch,
split into groups that share keys, or absent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emscan.classify.flow import ancestors, carries, descendants
from emscan.classify.site import Site
from emscan.measure.attention import AttentionHeads
from emscan.measure.layout import Layout, alternatives_last, split
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.axis_rules import einsum_terms
from emscan.trace.follow import Taps
from emscan.trace.graph import Call, Value
from emscan.trace.operators import CONTRACTION
from emscan.trace.origins import Dim, Dims, Factor

Result = tuple[Components | None, Responsibility | None, list[str]]
_Mark = tuple[int, int, int]


class _PerHead:
    """What both meters end with."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._heads: AttentionHeads | None = None

    def _of(self, heads: int, keys: int) -> AttentionHeads:
        if self._heads is None or self._heads.heads != heads:
            self._heads = AttentionHeads(heads, keys, self._thresholds)
        return self._heads

    def finish(self, samples: int) -> Result:
        """Return the statistics of the row; keys have no identity, so there are no components."""
        if self._heads is None:
            return None, None, []
        return None, self._heads.responsibility(), ["non-finite"] if self._heads.nonfinite else []


class AttentionMeter(_PerHead):
    """Attention in one operator: scores are formed again, a few megabytes at a time."""

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        assert site.attention is not None
        query, key = site.attention.arg("query"), site.attention.arg("key")
        assert isinstance(query, Value)
        assert isinstance(key, Value)
        lead = _Lead.of(axes.of(query))
        own = _same_axis(axes.of(query)[-2], axes.of(key)[-2])
        taps.on_call(site.attention.key, (id(self), "odds"), lambda named, out: self._see(lead, own, named, out))

    def _see(self, lead: _Lead, own: bool, named: dict[str, Any], out: Tensor) -> None:
        rank = named["query"].dim()
        query, key, out = (lead.heads_last(t, rank) for t in (named["query"], named["key"], out))
        mask = named.get("attn_mask")
        if mask is not None and mask.dim() > 2:
            mask = lead.heads_last(mask, rank)
        self._of(query.shape[-3], key.shape[-2]).update(
            query, key, mask=mask, causal=bool(named.get("is_causal", False)), scale=named.get("scale"), output=out,
            own=own,
        )  # fmt: skip


@dataclass(frozen=True)
class _Lead:
    """Where the heads are among the leading axes of queries (..., L, E). ``layout``: None where they are at -3 alone."""

    layout: Layout | None
    single: bool  # none of the leading axes are heads

    @classmethod
    def of(cls, dims: Dims) -> _Lead:
        """Find the heads of queries with these dimensions."""
        lead = dims[:-2]
        persistent = [[f.origin.persistent for f in dim] for dim in lead]
        if any(any(some) for some in persistent):
            elsewhere = any(any(some) for some in persistent[:-1]) or not all(persistent[-1])
            return cls(split(lead, lambda f: f.origin.persistent) if elsewhere else None, single=False)
        known = bool(lead) and bool(lead[-1]) and all(f.origin.kind == "input" or f.origin.position for f in lead[-1])
        return cls(None, single=len(lead) < 2 or known)

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


class ScoresMeter(_PerHead):
    """Attention whose scores the model writes out."""

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        weighted = site.weights is not None
        value = site.weights if site.weights is not None else site.energies
        taken = site.weights_axes if weighted else site.axes
        spot = _Spot.of(axes.of(value), taken, _queries_of(site, axes))
        taps.on_value(value.key, (id(self), "posterior"), lambda s: self._scores(site, s, spot, weighted))
        out = _posterior_mean(site)
        if out is not None:
            told = spot.in_output(axes.of(out))
            if told is not None:
                taps.on_value(out.key, (id(self), "output"), lambda o: self._outputs(told, o))

    def _scores(self, site: Site, scores: Tensor, spot: _Spot, weighted: bool) -> None:
        rows = spot.heads_last(scores)
        heads = self._of(rows.shape[-3], rows.shape[-1])
        if weighted:
            heads.update_weights(rows, own=spot.own)
        else:
            heads.update_scores(rows, site.sign, own=spot.own)

    def _outputs(self, spot: _Spot, output: Tensor) -> None:
        if self._heads is not None and spot.layout.fits(output):
            rows = spot.heads_last(output)
            if rows.shape[-3] == self._heads.heads:
                self._heads.update_output(rows)


@dataclass(frozen=True)
class _Spot:
    """Where heads, queries and the last axes (keys, or features of an output) are in a tensor."""

    layout: Layout
    query: int | None  # view axis
    last: tuple[int, ...]  # view axes
    own: bool  # key i belongs to query i
    heads: frozenset[_Mark]
    standing: frozenset[_Mark]  # of everything but the keys

    @classmethod
    def of(cls, dims: Dims, taken: tuple[int, ...], queries: Dim) -> _Spot:
        """Find them in scores with alternatives along ``taken``; ``queries``: the factors that only queries have."""
        rank = len(dims)
        keys = {axis % rank for axis in taken}
        ours = {_mark(f) for f in queries}
        rest = [f for d, dim in enumerate(dims) if d not in keys for f in dim]
        heads = frozenset(_mark(f) for f in rest if f.origin.persistent and _mark(f) not in ours)
        layout = split(dims, lambda f: _mark(f) in heads)
        query = next((d for d, dim in enumerate(dims) if d not in keys and _marks(dim) & ours), None)
        if query is None:
            query = next((d for d in reversed(range(rank)) if d not in keys and not _all_in(dims[d], heads)), None)
        own = query is not None and len(keys) == 1 and _same_axis(dims[query], dims[next(iter(keys))])
        standing = frozenset(_mark(f) for f in rest)
        return cls(layout, _view_axis(layout, query), _view_axes(layout, keys), own, heads, standing)

    def in_output(self, dims: Dims) -> _Spot | None:
        """Find heads and features in the posterior means (..., V); None where the heads cannot be told."""
        layout = split(dims, lambda f: _mark(f) in self.heads)
        if self.heads - {_mark(f) for dim in dims for f in dim}:
            return None
        features = {d for d, dim in enumerate(dims) if dim and not _marks(dim) & self.standing}
        left = [d for d, dim in enumerate(dims) if d not in features and not _all_in(dim, self.heads)]
        query = left[-1] if left else None
        return _Spot(layout, _view_axis(layout, query), _view_axes(layout, features), False, self.heads, self.standing)

    def heads_last(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (..., H, L, last)."""
        viewed = self.layout.view(tensor)
        heads = self.layout.unit_dims
        query = () if self.query is None else (self.query,)
        others = [a for a in range(viewed.dim()) if a not in {*heads, *query, *self.last}]
        sizes = [math.prod(viewed.shape[a] for a in some) for some in (heads, query)]
        rows = alternatives_last(viewed.permute(*others, *heads, *query, *self.last), tuple(range(-len(self.last), 0)))
        return rows.reshape(-1, *sizes, rows.shape[-1] if self.last else 1)


def _mark(factor: Factor) -> _Mark:
    """What tells heads from the features inside them, which walk along the same axis of one weight."""
    return factor.origin.id, factor.step, factor.size


def _marks(dim: Dim) -> set[_Mark]:
    return {_mark(factor) for factor in dim}


def _all_in(dim: Dim, marks: frozenset[_Mark]) -> bool:
    return bool(dim) and all(_mark(f) in marks for f in dim)


def _view_axes(layout: Layout, dims: set[int]) -> tuple[int, ...]:
    """Return the axes of the view that dimensions of the tensor have become, heads left out."""
    starts = [sum(layout.pattern[:d]) for d in range(len(layout.pattern))]
    found = [a for d in sorted(dims) for a in range(starts[d], starts[d] + layout.pattern[d])]
    return tuple(a for a in found if a not in layout.unit_dims)


def _view_axis(layout: Layout, dim: int | None) -> int | None:
    axes = _view_axes(layout, {dim}) if dim is not None else ()
    return axes[-1] if axes else None


def _same_axis(a: Dim, b: Dim) -> bool:
    """Whether two dimensions walk along the same axis of the input: a sequence that attends to itself."""
    return bool(a) and [f.origin.id for f in a] == [f.origin.id for f in b]


def _queries_of(site: Site, axes: Axes) -> Dim:
    """Return the factors of the axis that only the queries have, by the product that made the scores."""
    made = next((v.call for v in ancestors(site.energies, carries) if v.call and v.call.op in CONTRACTION), None)
    if made is None or len(made.inputs) < 2:
        return ()
    dims = axes.of(made.out)
    if made.op == "aten.einsum":
        return _einsum_queries(made, axes)
    if made.op == "aten.linear" or len(dims) < 2:
        return ()
    keys = _alternative_origins(site, axes)
    if any(f.origin.id in keys for f in dims[-1]):
        return dims[-2]
    return dims[-1] if any(f.origin.id in keys for f in dims[-2]) else ()


def _alternative_origins(site: Site, axes: Axes) -> set[int]:
    dims = axes.of(site.energies)
    return {f.origin.id for axis in site.axes for f in dims[axis]}


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


def _posterior_mean(site: Site) -> Value | None:
    """Return the product of the posterior and the values."""
    for user, operand in descendants(site.emitted, carries):
        if user.op in CONTRACTION and operand.param and len(user.inputs) == 2 and user.op != "aten.linear":
            return user.out
    return None
