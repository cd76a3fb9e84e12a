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

_SCORES = 1 << 17  # scores alive at a time: with their softmax they stay in cache


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
        bias = mask.expand(*query.shape[:-1], size).reshape(-1, heads, length, size) if mask is not None else None
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
                shown = None
                if causal:
                    at = torch.arange(start, min(length, start + rows), device=q.device)
                    shown = at[:, None] >= torch.arange(size, device=q.device)
                if bias is not None:
                    shown, scores = _masked(bias[batch, :, part], shown, scores)
                self._update(scores, shown, start, length == size)
        if output is not None:
            norms = torch.linalg.vector_norm(output, dim=(-2, -1), dtype=torch.float32).reshape(-1, heads)
            self.norm += norms.double().sum(0).cpu()
            self.outputs += len(norms)

    def update_scores(self, scores: Tensor, scale: float = 1.0) -> None:
        """See scores s (..., H, L, S) with r = softmax(scale * s); those absurdly far below the best are masked."""
        for start, (part,) in _parts(scores):
            wide = part.to(torch.float32, copy=True).mul_(scale)  # a copy: the statistics work in place
            self._update(wide, visible_alternatives(wide, -1), start, scores.shape[-2] == scores.shape[-1])

    def update_probabilities(self, r: Tensor, shown: Tensor | None) -> None:
        """See responsibilities (..., H, L, S) themselves; ``shown``: bool, which keys a mask has left."""
        for start, (part, *seen) in _parts(r, *([shown.expand(r.shape)] if shown is not None else [])):
            wide = part.float()
            self._count(
                wide, entropy(wide), wide.amax(-1), seen[0] if seen else None, start, r.shape[-2] == r.shape[-1]
            )

    def _update(self, scores: Tensor, shown: Tensor | None, start: int, square: bool) -> None:
        hidden = ~shown if shown is not None else None
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        best = scores.amax(-1)
        r = torch.softmax(scores, -1)
        top = r.amax(-1)
        mean = scores.mul_(r)
        if hidden is not None:
            mean.masked_fill_(hidden, 0.0)
        h = (best - top.log() - mean.sum(-1)).clamp_(min=0)
        self._count(r, h, top, shown, start, square)

    def _count(self, r: Tensor, h: Tensor, top: Tensor, shown: Tensor | None, start: int, square: bool) -> None:
        """Count one piece: r (N, H, l, S) of the queries from ``start`` on; h, top (N, H, l)."""
        seen = torch.full_like(h, r.shape[-1]) if shown is None else shown.sum(-1).to(h.dtype).expand(h.shape)
        sighted = seen >= 1
        if not bool(h.sum().isfinite()):  # the entropy of a query that sees nothing is NaN, too
            sighted = sighted & h.isfinite()
            self.nonfinite = self.nonfinite or bool(((seen >= 1) & ~sighted).any())
        self.queries += sighted.sum((0, 2)).cpu()
        self.first += r[..., 0].nan_to_num().sum((0, 2), dtype=torch.float64).cpu()
        if square:
            self.diagonal += r.diagonal(start, -2, -1).nan_to_num().sum((0, 2), dtype=torch.float64).cpu()
            self.aligned += sighted.sum((0, 2)).cpu()
        real = sighted & (seen >= 2)
        self.measured += real.sum((0, 2)).cpu()
        self.normalized += torch.where(real, h / seen.clamp(min=2).log(), 0.0).sum((0, 2)).cpu()
        self.hard += ((top >= self._thresholds.hard) & real).sum((0, 2)).cpu()
        everything = bool(real.all())
        self.entropy.update(h if everything else h[real])
        self.largest.update(top if everything else top[real])

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


def _steps(heads: int, length: int, size: int) -> tuple[int, int]:
    """Return how many samples and how many queries of each to look at together."""
    if heads * length * size <= _SCORES:
        return max(1, _SCORES // max(1, heads * length * size)), max(1, length)
    return 1, max(1, _SCORES // (heads * size))


def _parts(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield slices (n, H, l, S) of tensors (..., H, L, S), each with the index of its first query."""
    heads, length, size = tensors[0].shape[-3:]
    whole = [tensor.reshape(-1, heads, length, size) for tensor in tensors]
    samples, rows = _steps(heads, length, size)
    for sample in range(0, len(whole[0]), samples):
        for start in range(0, length, rows):
            yield start, [tensor[sample : sample + samples, :, start : start + rows] for tensor in whole]


def _masked(piece: Tensor, shown: Tensor | None, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a mask; return which keys it leaves, and the scores with an additive mask's finite part added."""
    if piece.dtype == torch.bool:
        visible = piece
    else:
        scores = scores + piece.float()
        best = scores.amax(-1, keepdim=True)
        visible = torch.isfinite(scores) & (scores >= best - _MASKED)
    return (visible if shown is None else visible & shown), scores
