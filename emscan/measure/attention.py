"""Attention per head, from queries and keys: never more than a few megabytes of scores at a time.

With s the scores of a query over the keys it may see: r = softmax(s), log Z = max s - log max r,
H = log Z - sum_j r_j s_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from emscan.measure.alternatives import _MASKED, entropy, visible_alternatives
from emscan.measure.histogram import Histogram
from emscan.report.document import EntropySummary, Head, MaxSummary, Responsibility, Thresholds

_SCORES = 1 << 19  # scores alive at a time: 2 MiB, and as much for their softmax
_HIDDEN = -1e30  # score of a masked key: its share underflows to 0, and 0 times it is 0, unlike with -inf


class AttentionHeads:
    """Streamed statistics of ``heads`` attention heads over about ``keys`` keys.

    Quantiles of the entropy come from bins on [0, ln keys]; what a longer batch adds above falls into the last one.
    Queries without a key in sight are no competitions; those with a single key are left out of entropies.
    """

    def __init__(self, heads: int, keys: int, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self.heads = heads
        zeros = torch.zeros(heads, dtype=torch.float64)
        self.queries = zeros.clone()  # with at least one key in sight
        self.measured = zeros.clone()  # with at least two
        self.normalized, self.first, self.diagonal, self.hard = (zeros.clone() for _ in range(4))
        self.aligned = zeros.clone()  # queries of square attention
        self.norm, self.outputs = zeros.clone(), 0
        self.entropy = Histogram(0.0, math.log(max(2, keys)))
        self.largest = Histogram(0.0, 1.0)
        self.nonfinite = False

    def update(
        self, query: Tensor, key: Tensor, *, mask: Tensor | None = None, causal: bool = False,
        scale: float | None = None, output: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See one call: query (..., H, L, E), key (..., G, S, E) with G dividing H; mask bool (True: visible) or
        additive, broadcastable to (..., H, L, S); output (..., H, L, V)."""
        heads = query.shape[-3] if query.dim() >= 3 else 1
        length, size = query.shape[-2], key.shape[-2]
        q = query.reshape(-1, heads, length, query.shape[-1])
        k = key.reshape(-1, key.shape[-3] if key.dim() >= 3 else 1, size, key.shape[-1])
        if k.shape[1] != heads:
            k = k.repeat_interleave(heads // k.shape[1], 1)
        factor = scale if scale is not None else query.shape[-1] ** -0.5
        found = _Queries(len(q), heads, length, size, q.device)
        at, keys = torch.arange(length, device=q.device), torch.arange(size, device=q.device)
        bias = None
        if mask is not None:
            bias, seen = _bias(mask, at[:, None] >= keys if causal else None, size)
            found.seen.copy_(seen.expand(query.shape[:-1]).reshape(found.seen.shape))
            bias = bias.expand(*query.shape[:-1], size).reshape(-1, heads, length, size)
        elif causal:
            found.seen.copy_((at + 1).clamp(max=size))
        samples, rows = _steps(heads, length, size)
        for sample in range(0, len(q), samples):
            batch = slice(sample, sample + samples)
            keys_t = k[batch].float().flatten(0, 1).transpose(-2, -1)
            for start in range(0, length, rows):
                part = slice(start, start + rows)
                some = q[batch, :, part].float()
                buffer = some.new_empty(keys_t.shape[0], some.shape[2], size)
                # the scale costs nothing inside the product
                scores = torch.baddbmm(buffer, some.flatten(0, 1), keys_t, beta=0, alpha=factor, out=buffer)
                scores = scores.unflatten(0, some.shape[:2])
                if causal:
                    scores.add_(torch.where(at[part, None] >= keys, 0.0, _HIDDEN))
                if bias is not None:
                    scores.add_(bias[batch, :, part])
                found.see_scores(batch, part, scores)
        self._count(found)
        if output is not None:
            wide = torch.promote_types(output.dtype, torch.float32)
            norms = torch.linalg.vector_norm(output, dim=(-2, -1), dtype=wide).reshape(-1, heads)
            self.norm += norms.double().sum(0).cpu()
            self.outputs += len(norms)

    def update_scores(self, scores: Tensor, scale: float = 1.0) -> None:
        """See scores s (..., H, L, S) with r = softmax(scale * s); those absurdly far below the best are masked."""
        found, parts = _walk(scores)
        for batch, queries, (part,) in parts:
            wide = part.to(torch.float32, copy=True).mul_(scale)  # a copy: the statistics work in place
            shown = visible_alternatives(wide, -1)
            if shown is not None:
                self.nonfinite = self.nonfinite or not bool((wide < math.inf).all())
                found.seen[batch, :, queries] = shown.sum(-1)
                wide.masked_fill_(~shown, _HIDDEN)
            found.see_scores(batch, queries, wide)
        self._count(found)

    def update_probabilities(self, r: Tensor, shown: Tensor | None) -> None:
        """See responsibilities (..., H, L, S) themselves; ``shown``: bool, which keys a mask has left."""
        found, parts = _walk(r, *([shown.expand(r.shape)] if shown is not None else []))
        for batch, queries, (part, *seen) in parts:
            wide = part.float()
            if seen:
                found.seen[batch, :, queries] = seen[0].sum(-1)
            found.see(batch, queries, wide, entropy(wide), wide.amax(-1))
        self._count(found)

    def _count(self, found: _Queries) -> None:
        """Add what the queries of one call have shown."""
        h, seen = found.entropy.clamp_(min=0), found.seen
        sighted = seen >= 1
        if not bool(h.sum().isfinite()):  # the entropy of a query that sees nothing is NaN, too
            sighted = sighted & h.isfinite()
            self.nonfinite = self.nonfinite or bool(((seen >= 1) & ~sighted).any())
        self.queries += sighted.sum((0, 2)).cpu()
        self.first += torch.where(sighted, found.first, 0.0).sum((0, 2), dtype=torch.float64).cpu()
        if found.square:
            self.aligned += sighted.sum((0, 2)).cpu()
            self.diagonal += torch.where(sighted, found.own, 0.0).sum((0, 2), dtype=torch.float64).cpu()
        real = sighted & (seen >= 2)
        self.measured += real.sum((0, 2)).cpu()
        self.normalized += torch.where(real, h / seen.clamp(min=2).log(), 0.0).sum((0, 2)).cpu()
        self.hard += ((found.top >= self._thresholds.hard) & real).sum((0, 2)).cpu()
        everything = bool(real.all())
        self.entropy.update(h if everything else h[real])
        self.largest.update(found.top if everything else found.top[real])

    def merge(self, other: AttentionHeads) -> None:
        """Add what another probe shard has shown."""
        for name in ("queries", "measured", "normalized", "first", "diagonal", "hard", "aligned", "norm", "outputs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.entropy.merge(other.entropy)
        self.largest.merge(other.largest)
        self.nonfinite = self.nonfinite or other.nonfinite

    def responsibility(self) -> Responsibility:
        """Return the statistics of the row and of every head."""
        found = Responsibility(int(self.queries.sum()))
        total = float(self.measured.sum())
        if not total:
            return found
        h = self.entropy
        found.entropy = EntropySummary(
            h.mean, h.minimum, h.quantile(0.05), h.quantile(0.5), h.quantile(0.95), h.maximum
        )
        found.normalized_entropy = float(self.normalized.sum()) / total
        found.max = MaxSummary(self.largest.mean, self.largest.quantile(0.95))
        found.hard_fraction = float(self.hard.sum()) / total
        found.heads = [self._head(i) for i in range(self.heads)]
        return found

    def _head(self, i: int) -> Head:
        queries, measured, aligned = (float(t[i]) for t in (self.queries, self.measured, self.aligned))
        layer = float(self.norm.mean()) if self.outputs else 0.0
        return Head(
            float(self.normalized[i]) / measured if measured else None,
            float(self.first[i]) / queries if queries else None,
            float(self.diagonal[i]) / aligned if aligned else None,
            float(self.hard[i]) / measured if measured else None,
            float(self.norm[i]) / layer if layer else None,
        )


def _bias(mask: Tensor, causal: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Return a mask (..., S) as what it adds to the scores, and how many keys it leaves; both may broadcast."""
    shown = mask if mask.dtype == torch.bool else mask > -_MASKED
    bias = torch.where(shown, 0.0 if mask.dtype == torch.bool else mask.float(), _HIDDEN)
    shown = shown.expand(*shown.shape[:-1], size)
    return bias, (shown if causal is None else shown & causal).sum(-1)


def _steps(heads: int, length: int, size: int) -> tuple[int, int]:
    """Return how many samples and how many queries of each to look at together."""
    if heads * length * size <= _SCORES:
        return max(1, _SCORES // max(1, heads * length * size)), max(1, length)
    return 1, max(1, _SCORES // (heads * size))


class _Queries:
    """What every query of one call has shown, (N, H, L): counted once, since small pieces of scores are many."""

    def __init__(self, samples: int, heads: int, length: int, size: int, device: torch.device) -> None:
        self.entropy, self.top, self.first, self.own, self.seen = torch.zeros(5, samples, heads, length, device=device)
        self.seen.fill_(size)
        self.square = length == size

    def see_scores(self, batch: slice, queries: slice, scores: Tensor) -> None:
        """See scores (n, H, l, S), which are overwritten."""
        best = scores.amax(-1)
        r = torch.softmax(scores, -1)
        top = r.amax(-1)
        mean = scores.mul_(r).sum(-1)
        self.see(batch, queries, r, best.sub_(top.log()).sub_(mean), top)

    def see(self, batch: slice, queries: slice, r: Tensor, h: Tensor, top: Tensor) -> None:
        """See responsibilities r (n, H, l, S) with entropies h and maxima top (n, H, l)."""
        self.entropy[batch, :, queries], self.top[batch, :, queries] = h, top
        self.first[batch, :, queries] = r[..., 0]
        if self.square:
            self.own[batch, :, queries] = r.diagonal(queries.start, -2, -1)


def _walk(*tensors: Tensor) -> tuple[_Queries, Iterator[tuple[slice, slice, list[Tensor]]]]:
    """Return room for the queries of tensors (..., H, L, S), and their pieces: samples, queries, slices."""
    heads, length, size = tensors[0].shape[-3:]
    whole = [tensor.reshape(-1, heads, length, size) for tensor in tensors]
    samples, rows = _steps(heads, length, size)
    places = (
        (slice(sample, sample + samples), slice(start, start + rows))
        for sample in range(0, len(whole[0]), samples)
        for start in range(0, length, rows)
    )
    found = _Queries(len(whole[0]), heads, length, size, tensors[0].device)
    return found, ((batch, part, [tensor[batch, :, part] for tensor in whole]) for batch, part in places)
