"""From attention sites to accumulators, one per head: attention in one operator, and softmax over scores written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.attention import AttentionHeads
from emscan.measure.attention_axes import Beside, Lead, Spot, posterior_mean, queries_of, same_axis
from emscan.measure.masking import can_mask
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps
from emscan.trace.graph import Value

Result = tuple[Components | None, Responsibility | None, list[str]]


class _PerHead:
    """What both meters end with."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._heads: AttentionHeads | None = None
        self._uneven = False  # another call had another number of heads

    def _of(self, heads: int, keys: int) -> AttentionHeads:
        if self._heads is None:
            self._heads = AttentionHeads(heads, keys, self._thresholds)
        if self._heads.heads == heads:
            return self._heads
        self._uneven = True
        return AttentionHeads(heads, keys, self._thresholds)

    def finish(self, samples: int) -> Result:
        """Return the statistics of the row; keys have no identity, so there are no components."""
        if self._heads is None or self._uneven:
            return None, None, ["uneven"] if self._uneven else []
        return None, self._heads.responsibility(), ["non-finite"] if self._heads.nonfinite else []


class AttentionMeter(_PerHead):
    """Attention in one operator: scores are formed again, a few megabytes at a time."""

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        assert site.attention is not None
        query, key = site.attention.arg("query"), site.attention.arg("key")
        assert isinstance(query, Value)
        assert isinstance(key, Value)
        lead = Lead.of(axes.of(query))
        own = same_axis(axes.of(query)[-2], axes.of(key)[-2])
        taps.on_call(site.attention.key, (id(self), "odds"), lambda named, out: self._see(lead, own, named, out))

    def _see(self, lead: Lead, own: bool, named: dict[str, Any], out: Tensor) -> None:
        rank = named["query"].dim()
        query, key, out = (lead.heads_last(t, rank) for t in (named["query"], named["key"], out))
        mask = named.get("attn_mask")
        if mask is not None and mask.dim() > 2:
            mask = lead.heads_last(mask, rank)
        self._of(query.shape[-3], key.shape[-2]).update(
            query, key, mask=mask, causal=bool(named.get("is_causal", False)), scale=named.get("scale"), output=out,
            own=own,
        )  # fmt: skip


class ScoresMeter(_PerHead):
    """Attention whose scores the model writes out."""

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        weighted = site.weights is not None
        value = site.weights if site.weights is not None else site.energies
        taken = site.weights_axes if weighted else site.axes
        beside = Beside.of(site, axes)
        # an exponential that underflows is no mask; a kernel has its zeros from elsewhere
        self._masks = (weighted and site.mechanism != "softmax") or can_mask(site)
        spot = Spot.of(axes.of(value), taken, queries_of(site, axes, beside.scores), axes.of(beside.scores))
        if site.sink and site.denominator is not None:
            shares = _Shares(lambda w, rest: self._weights(w, spot, beside, rest))
            taps.on_value(value.key, (id(self), "weights"), shares.hear_weights)
            taps.on_value(site.denominator.key, (id(self), "denominator"), lambda z: shares.hear_sum(z, taken))
        elif weighted:
            taps.on_value(value.key, (id(self), "posterior"), lambda w: self._weights(w, spot, beside))
        else:
            taps.on_value(value.key, (id(self), "posterior"), lambda s: self._scores(s, site.sign, spot, beside))
        mixed = posterior_mean(site, axes)
        told = spot.in_output(mixed) if mixed is not None else None
        if mixed is not None and told is not None:
            taps.on_value(mixed.out.key, (id(self), "output"), lambda o: self._outputs(told, o))

    def _scores(self, scores: Tensor, sign: float, spot: Spot, beside: Beside) -> None:
        rows = spot.heads_last(scores)
        self._of(rows.shape[-3], rows.shape[-1]).update_scores(
            rows, sign, own=spot.own, beside=beside.sizes, masks=self._masks
        )

    def _weights(self, weights: Tensor, spot: Spot, beside: Beside, rest: Tensor | None = None) -> None:
        rows = spot.heads_last(weights)
        if rest is not None:  # what the denominator has beyond the weights: one more alternative, behind the keys
            rows = torch.cat([rows, spot.heads_last(rest)], -1)
            beside = replace(beside, behind=beside.behind + 1)
        self._of(rows.shape[-3], rows.shape[-1]).update_weights(
            rows, own=spot.own, beside=beside.sizes, masks=self._masks
        )

    def _outputs(self, spot: Spot, output: Tensor) -> None:
        if self._heads is not None and spot.layout.fits(output):
            rows = spot.heads_last(output)
            if rows.shape[-3] == self._heads.heads:
                self._heads.update_output(rows)


class _Shares:
    """Weights and the larger sum that divides them, heard one after the other."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        self._see = see
        self._weights: Tensor | None = None

    def hear_weights(self, weights: Tensor) -> None:
        """Wait for the sum of these."""
        self._weights = weights

    def hear_sum(self, total: Tensor, axes: tuple[int, ...]) -> None:
        """See weights and what the sum has beyond them, of one entry along ``axes``."""
        weights, self._weights = self._weights, None
        if weights is None:
            return
        own = weights.sum(axes, keepdim=True, dtype=torch.promote_types(weights.dtype, torch.float32))
        if total.numel() == own.numel():
            self._see(weights, (total.reshape(own.shape) - own).clamp(min=0).to(own.dtype))
