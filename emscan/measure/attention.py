"""Attention per head, from queries and keys: never more than a few megabytes of scores at a time.

With s the scores of a query over the keys it may see: r = softmax(s), log Z = max s - log max r,
H = log Z - sum_j r_j s_j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emscan.measure.alternatives import _MASKED
from emscan.measure.histogram import Histogram
from emscan.report.document import EntropySummary, Head, MaxSummary, Responsibility, Thresholds

_SCORES = 1 << 19  # scores alive at a time


class AttentionHeads:
    """Streamed statistics of ``heads`` attention heads over at most ``keys`` keys."""

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
        step = max(1, _SCORES // max(1, heads * length * size))
        rows = length if step > 1 or heads * length * size <= _SCORES else max(1, _SCORES // (heads * size))
        for sample in range(0, len(q), step):
            batch = slice(sample, sample + step)
            keys_t = k[batch].float().transpose(-2, -1)
            for start in range(0, length, rows):
                part = slice(start, start + rows)
                scores = torch.matmul(q[batch, :, part].float() * factor, keys_t)
                shown = None
                if causal:
                    at = torch.arange(start, min(length, start + rows), device=q.device)
                    shown = at[:, None] >= torch.arange(size, device=q.device)
                if bias is not None:
                    piece = bias[batch, :, part]
                    shown, scores = _masked(piece, shown, scores)
                self._update(scores, shown, start, length == size)
        if output is not None:
            norms = torch.linalg.vector_norm(
                output.reshape(-1, heads, output.shape[-2] * output.shape[-1]).float(), dim=-1
            )
            self.norm += norms.double().sum(0).cpu()
            self.outputs += len(norms)

    def update_probabilities(self, r: Tensor, shown: Tensor | None) -> None:
        """See responsibilities (..., H, L, S) themselves; ``shown``: bool, which keys a mask has left."""
        heads, length, size = r.shape[-3:]
        rows = r.reshape(-1, heads, length, size)
        seen = shown.expand(r.shape).reshape(rows.shape) if shown is not None else None
        step = max(1, _SCORES // max(1, heads * length * size))
        for start in range(0, len(rows), step):
            part = rows[start : start + step].float()
            h = torch.special.entr(part).sum(-1)
            self._count(
                part, h, part.amax(-1), seen[start : start + step] if seen is not None else None, 0, length == size
            )

    def _update(self, scores: Tensor, shown: Tensor | None, start: int, square: bool) -> None:
        if shown is not None:
            scores = scores.masked_fill(~shown, -math.inf)
        best = scores.amax(-1)
        r = torch.softmax(scores, -1)
        top = r.amax(-1)
        mean = scores.mul_(r)
        if shown is not None:
            mean = mean.masked_fill_(~shown.expand(mean.shape), 0.0)
        h = (best - top.log() - mean.sum(-1)).clamp_(min=0)
        self._count(r, h, top, shown, start, square)

    def _count(self, r: Tensor, h: Tensor, top: Tensor, shown: Tensor | None, start: int, square: bool) -> None:
        size = r.shape[-1]
        self.first += r[..., 0].nan_to_num().sum((0, 2), dtype=torch.float64).cpu()
        if square:
            own = r.diagonal(start, -2, -1)
            self.diagonal += own.nan_to_num().sum((0, 2), dtype=torch.float64).cpu()
            self.aligned += own.shape[0] * own.shape[-1]
        if shown is None:
            queries = r.shape[0] * r.shape[2]
            self.queries += queries
            if size < 2:
                return
            self.measured += queries
            self.normalized += h.sum((0, 2), dtype=torch.float64).cpu() / math.log(size)
            hard, kept_h, kept_top = top >= self._thresholds.hard, h, top
        else:
            seen = shown.sum(-1).expand(h.shape)
            self.queries += (seen >= 1).sum((0, 2)).cpu()
            real = seen >= 2
            self.measured += real.sum((0, 2)).cpu()
            share = torch.where(real, h.double() / seen.clamp(min=2).double().log(), 0.0)
            self.normalized += share.sum((0, 2)).cpu()
            hard, kept_h, kept_top = (top >= self._thresholds.hard) & real, h[real], top[real]
        self.hard += hard.sum((0, 2)).cpu()
        self.entropy.update(kept_h)
        self.largest.update(kept_top)

    def merge(self, other: AttentionHeads) -> None:
        """Add what another probe shard has shown."""
        for name in ("queries", "measured", "normalized", "first", "diagonal", "hard", "aligned", "norm", "outputs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.entropy.merge(other.entropy)
        self.largest.merge(other.largest)

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
            float(self.norm[i]) / layer / 1.0 if layer else None,
        )


def _masked(piece: Tensor, shown: Tensor | None, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a mask; return which keys it leaves, and the scores with an additive mask's finite part added."""
    if piece.dtype == torch.bool:
        visible = piece
    else:
        scores = scores + piece.float()
        best = scores.amax(-1, keepdim=True)
        visible = torch.isfinite(scores) & (scores >= best - _MASKED)
    return (visible if shown is None else visible & shown), scores
