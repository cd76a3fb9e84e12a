"""From attention sites to accumulators, one per head: attention in one operator, and softmax over scores written out."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.attention import AttentionHeads
from emscan.measure.layout import alternatives_last
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps

Result = tuple[Components | None, Responsibility | None, list[str]]


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


class ScoresMeter:
    """Attention whose scores the model writes out."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._heads: AttentionHeads | None = None

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        spot = _head_axes(site, axes)
        taps.on_value(site.energies.key, (id(self), "posterior"), lambda s: self._attention(site, s, spot))

    def _attention(self, site: Site, scores: Tensor, spot: tuple[int, ...]) -> None:
        """Per head: (..., heads, queries, keys) from wherever the heads are."""
        rows = alternatives_last(scores, site.axes)
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
        """Return the statistics of the row; keys have no identity, so there are no components."""
        if self._heads is None:
            return None, None, []
        return None, self._heads.responsibility(), ["non-finite"] if self._heads.nonfinite else []


def _head_axes(site: Site, axes: Axes) -> tuple[int, ...]:
    """Return the axes of the scores that run over heads: those that come from parameters alone."""
    dims = axes.of(site.energies)
    taken = {axis % len(dims) for axis in site.axes}
    return tuple(d for d, dim in enumerate(dims) if d not in taken and dim and all(f.origin.persistent for f in dim))
