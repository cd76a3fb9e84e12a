"""From sites with K alternatives to accumulators: softmax, kernel, attention, truncation, selection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.alternatives import Alternatives
from emscan.measure.attention import AttentionHeads
from emscan.report.document import Components, EntropySummary, MaxSummary, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps
from emscan.trace.graph import Value
from emscan.trace.operators import SOFTMAX

Result = tuple[Components | None, Responsibility | None, list[str]]
_MOST_VARIANCES = 4096


class AlternativesMeter:
    """Softmax, kernel and truncation rows: responsibilities from the scores, picks from the indices really used."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site = site
        self._router = site.mechanism == "truncation" and site.kind == "experts"
        self._stats = Alternatives(int(site.count or 2), site.persistent, thresholds)
        self._heads: AttentionHeads | None = None
        self._thresholds = thresholds

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        if site.terms or site.numerator is not None:
            return
        if site.chosen is not None and site.persistent:
            taps.on_value(site.chosen.key, (id(self), "chosen"), self._stats.update_assignments)
        if not site.energies.data:  # a learned vector: the same in every batch
            if site.energies.tensor is not None:
                self._scores(site, site.energies.tensor)
            return
        hard = site.mechanism == "truncation"
        if site.kind == "keys" and site.weights is None and not hard:
            spot = _head_axes(site, axes)
            taps.on_value(site.energies.key, (id(self), "posterior"), lambda s: self._attention(site, s, spot))
        elif (site.sink and site.statistic != "log-partition") or (hard and site.statistic == "vector"):
            taps.on_value(site.emitted.key, (id(self), "posterior"), lambda r: self._shares(site, r))
        elif site.weights is not None:
            taps.on_value(site.weights.key, (id(self), "posterior"), lambda w: self._weights(site, w))
        elif hard and site.soft is not None:
            soft = site.soft
            taps.on_value(soft.key, (id(self), "posterior"), lambda r: self._posterior(site, soft, r))
        elif not hard or site.kind == "experts":
            taps.on_value(site.energies.key, (id(self), "posterior"), lambda s: self._scores(site, s))
        wanted = (
            site.persistent
            and int(site.count or 0) <= _MOST_VARIANCES
            and site.weights is None
            and not hard
            and not site.sink
        )
        if wanted and len(site.axes) == 1:
            taps.on_value(
                site.energies.key, (id(self), "variance"), lambda s: self._stats.update_energies(s, site.axes[0])
            )

    def _scores(self, site: Site, scores: Tensor) -> None:
        """Responsibilities from scores in float32 at least, whatever the model's dtype."""
        rows = _alternatives_last(scores, site.axes)
        masks = not (site.persistent and site.kind == "classes")
        self._stats.update_scores(rows, scale=site.sign, masks=masks)

    def _weights(self, site: Site, weights: Tensor) -> None:
        rows = _alternatives_last(weights, site.weights_axes)
        rows = rows.reshape(-1, rows.shape[-1])
        for part in rows.split(max(1, (1 << 18) // rows.shape[-1])):
            wide = part.double()
            if site.sink_weight:  # one more alternative, of fixed energy
                wide = torch.nn.functional.pad(wide, (0, 1), value=site.sink_weight)
            self._stats.update(wide / wide.sum(-1, keepdim=True), -1, wide > 0)

    def _shares(self, site: Site, r: Tensor) -> None:
        """Shares as the model handed them out; what a sink of fixed energy takes is one more alternative."""
        rows = _alternatives_last(r, site.axes).double()
        if site.sink:
            rows = torch.cat([rows, (1 - rows.sum(-1, keepdim=True)).clamp(min=0)], -1)
        self._stats.update(rows, -1)

    def _posterior(self, site: Site, soft: Value, r: Tensor) -> None:
        """The posterior before truncation; scores that were not normalized (sigmoids) are brought to sum to one."""
        rows = _alternatives_last(r, site.axes).double()
        if soft.call is None or soft.call.op not in SOFTMAX:
            rows = rows / rows.sum(-1, keepdim=True)
        self._stats.update(rows, -1)

    def _attention(self, site: Site, scores: Tensor, spot: tuple[int, ...]) -> None:
        """Per head: (..., heads, queries, keys) from wherever the heads are."""
        rows = _alternatives_last(scores, site.axes)
        heads = tuple(axis for axis in spot if axis < rows.dim() - 1)
        places = [axis for axis in range(rows.dim() - 1) if axis not in heads]
        order = [*places[:-1], *heads, *places[-1:], rows.dim() - 1]
        rows = rows.permute(order)
        queries = rows.shape[-2] if places else 1
        count = math.prod(scores.shape[axis] for axis in heads) if heads else 1
        rows = rows.reshape(-1, count, queries, rows.shape[-1])
        if self._heads is None:
            self._heads = AttentionHeads(count, rows.shape[-1], self._thresholds)
        self._heads.update_scores(rows, site.sign)

    def finish(self, samples: int) -> Result:
        """Return components and responsibilities of the row."""
        if self._heads is not None:
            return None, self._heads.responsibility(), ["non-finite"] if self._heads.nonfinite else []
        stats = self._stats
        if not (stats.competitions or stats.picks):
            return None, None, ["non-finite"] if stats.nonfinite else []
        hard = self._site.mechanism == "truncation"
        components = stats.components(self._site.kind, hard=hard) if stats.persistent else None
        found = stats.responsibility(router=self._router)
        if self._site.kind == "batch":
            found.information = None
        return components, found, ["non-finite"] if stats.nonfinite else []


def _alternatives_last(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the tensor with the axes of the alternatives merged into the last one."""
    rank = tensor.dim()
    wanted = sorted(axis % rank for axis in axes)
    moved = tensor.movedim(wanted, list(range(rank - len(wanted), rank)))
    return moved.flatten(rank - len(wanted)) if len(wanted) > 1 else moved


def _head_axes(site: Site, axes: Axes) -> tuple[int, ...]:
    """Return the axes of the scores that run over heads: those that come from parameters alone."""
    dims = axes.of(site.energies)
    taken = {axis % len(dims) for axis in site.axes}
    return tuple(d for d, dim in enumerate(dims) if d not in taken and dim and all(f.origin.persistent for f in dim))


class AttentionMeter:
    """Attention in one operator: scores are formed again, a few megabytes at a time."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._heads: AttentionHeads | None = None

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        assert site.attention is not None
        taps.on_call(site.attention.key, (id(self), "odds"), self._see)

    def _see(self, named: dict[str, Any], out: Tensor) -> None:
        query, key = named["query"], named["key"]
        heads = query.shape[-3] if query.dim() >= 4 else 1
        if query.dim() < 4:
            query, key, out = query.unsqueeze(-3), key.unsqueeze(-3), out.unsqueeze(-3)
        mask = named.get("attn_mask")
        if mask is not None and named["query"].dim() < 4 and mask.dim() == named["query"].dim():
            mask = mask.unsqueeze(-3)
        if self._heads is None or self._heads.heads != heads:
            self._heads = AttentionHeads(heads, key.shape[-2], self._thresholds)
        self._heads.update(
            query, key, mask=mask, causal=bool(named.get("is_causal", False)), scale=named.get("scale"), output=out
        )

    def finish(self, samples: int) -> Result:
        """Return the statistics of the row; keys have no identity, so there are no components."""
        if self._heads is None:
            return None, None, []
        return None, self._heads.responsibility(), ["non-finite"] if self._heads.nonfinite else []


class SelectionMeter:
    """One of K wins: who wins how often where alternatives are persistent, how many competitions elsewhere."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site = site
        self._stats = Alternatives(int(site.count or 2), site.persistent, thresholds)
        self._competitions = 0

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        if not site.persistent:
            taps.on_value(site.emitted.key, (id(self), "winners"), self._count)
        elif site.chosen is not None:
            taps.on_value(site.chosen.key, (id(self), "chosen"), self._stats.update_assignments)
        else:
            least = "min" in site.op
            taps.on_value(
                site.energies.key, (id(self), "winners"), lambda s: self._winners(-s if least else s, site.axes)
            )

    def _count(self, winners: Tensor) -> None:
        self._competitions += winners.numel()

    def _winners(self, scores: Tensor, axes: tuple[int, ...]) -> None:
        self._stats.update_assignments(_alternatives_last(scores, axes).argmax(-1))

    def finish(self, samples: int) -> Result:
        """Return who won; a selection is a competition of zero entropy."""
        count = self._competitions or self._stats.picks
        if not count:
            return None, None, []
        found = self._stats.responsibility() if self._stats.picks else Responsibility(count)
        found.entropy = EntropySummary(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        found.normalized_entropy, found.hard_fraction, found.max = 0.0, 1.0, MaxSummary(1.0, 1.0)
        components = self._stats.components(self._site.kind, hard=True) if self._stats.picks else None
        return components, found, []
