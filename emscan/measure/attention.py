"""Attention per head, from queries and keys: never more than a few megabytes of scores at a time.

With s the scores of a query over the keys it may see and b = max s: w = exp(s - b), Z = sum_j w_j, r = w / Z,
H = log Z - sum_j w_j (s_j - b) / Z, max r = 1 / Z. That costs about as much as the attention itself; log-sum-exps of a
fused kernel would give H for as much again, and no maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from emscan.measure.alternatives import MASKED
from emscan.measure.histogram import Histogram
from emscan.measure.queries import MANY, MILD, Queries
from emscan.report.document import EntropySummary, Head, MaxSummary, Responsibility, Temperature, Thresholds

_HIDDEN = -1e30  # score of a masked key: its share underflows to 0, and 0 times it is 0, unlike with -inf


class AttentionHeads:
    """Streamed statistics of ``heads`` attention heads over about ``keys`` keys.

    Quantiles of the entropy come from bins on [0, ln keys]; a longer batch adds bins above.
    Queries without a key in sight are no competitions, nor are those of padding: in square attention, positions whose
    key no query may see. Queries with a single key are left out of entropies.
    """

    def __init__(self, heads: int, keys: int, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self.heads = heads
        self.queries = torch.zeros(heads, dtype=torch.float64)  # with at least one key in sight
        self.measured = torch.zeros_like(self.queries)  # with at least two
        self.normalized, self.first, self.diagonal, self.hard = torch.zeros(4, heads, dtype=torch.float64)
        self.uniform = torch.zeros_like(self.queries)  # sum of 1 / keys in sight
        self.aligned = torch.zeros_like(self.queries)  # queries of square attention
        self.norm, self.outputs = torch.zeros_like(self.queries), torch.zeros_like(self.queries)
        self.passed = 0  # queries that were there, measured or not
        self.sampled = False
        self.scaled, self.half, self.double = 0, 0.0, 0.0
        self.entropy = Histogram(0.0, math.log(max(2, keys)), grows=True)
        self.largest = Histogram(0.0, 1.0)
        self.nonfinite = False
        self._sighted: Tensor | None = None  # which queries of the last call counted: those whose outputs do
        self._places: Tensor | None = None

    def update(
        self, query: Tensor, key: Tensor, *, mask: Tensor | None = None, causal: bool = False,
        scale: float | None = None, output: Tensor | None = None, own: bool = True,
    ) -> None:  # fmt: skip
        """See one call: query (..., H, L, E), key (..., G, S, E) with G dividing H; mask bool (True: visible) or
        additive, broadcastable to (..., H, L, S); output (..., H, L, V). ``own``: key i belongs to query i, where
        there are as many."""
        lead, heads, length, size = query.shape[:-3], query.shape[-3], query.shape[-2], key.shape[-2]
        samples = math.prod(lead)
        if not samples * length * size:
            return
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k = (t.reshape(samples, *t.shape[-3:]) for t in (query, key.expand(*lead, *key.shape[-3:])))
        shared = heads // k.shape[1]
        mask = _one_lead(mask, lead) if mask is not None else None
        found = Queries(samples, heads, length, size, q.device, wide)
        factor = scale if scale is not None else query.shape[-1] ** -0.5
        keys = torch.arange(size, device=q.device)
        mild = mask is None and not causal and size >= MANY
        bounds = _largest(q) * _largest(k).repeat_interleave(shared, -1) * abs(factor) if mild else None
        with exact_products():
            for some, part, rows in found.blocks():
                places = found.places[rows]
                last = min(size, int(places[-1]) + 1) if causal else size  # what no query of the block sees stays away
                of_keys = k[some, part] if shared == 1 else k[some][:, torch.arange(heads)[part] // shared]
                ours = q[some, part][..., places if found.sampled else rows, :].to(wide)
                theirs = of_keys[..., :last, :].to(wide).transpose(-2, -1)
                scores = ours.new_empty(*ours.shape[:-1], last)
                for n in range(len(ours)):  # one sample's heads are strided as a product likes them: nothing is copied
                    torch.baddbmm(scores[n], ours[n], theirs[n], beta=0, alpha=factor, out=scores[n])
                if bounds is not None and bool(bounds[some, part].amax() <= MILD):
                    found.see_mild((some, part, rows), scores)
                    continue
                later = keys[:last] > places[:, None] if causal else None
                seen = _hide(scores, found.of_mask(mask, some, part, rows), later)
                found.see_scores((some, part, rows), scores, seen)
        if own and mask is not None:
            found.leave_padding(_keys_in_sight(mask, size, length if causal else None))
        self._count(found)
        if output is not None:
            self.update_output(output)

    def update_scores(
        self, scores: Tensor, scale: float = 1.0, *, own: bool = True, beside: tuple[int, int] = (0, 0),
        masks: bool = True,
    ) -> None:  # fmt: skip
        """See scores s (..., H, L, S) with r = softmax(scale * s); those of -inf are masked.

        ``masks``: so are those absurdly far below the best.
        ``beside``: how many alternatives before and behind the keys are none (sinks).
        """
        if not scores.numel():
            return
        whole = scores.reshape(-1, *scores.shape[-3:])
        found = Queries.of(whole, beside)
        for place, piece in found.pieces(whole):
            wide = piece.to(found.entropy.dtype, copy=True)  # a copy: the statistics work in place
            found.see_masked(place, wide.mul_(scale) if scale != 1.0 else wide, MASKED if masks else math.inf)
        self.nonfinite = self.nonfinite or found.nonfinite
        if found.hidden and own:
            found.leave_padding(_scores_in_sight(whole, scale, MASKED if masks else math.inf))
        self._count(found)

    def update_weights(
        self, weights: Tensor, *, own: bool = True, beside: tuple[int, int] = (0, 0), masks: bool = True
    ) -> None:
        """See nonnegative weights w (..., H, L, S) with r = w / sum w; ``masks``: a key of weight 0 is masked."""
        if not weights.numel():
            return
        whole = weights.reshape(-1, *weights.shape[-3:])
        found = Queries.of(whole, beside)
        for place, piece in found.pieces(whole):
            wide = piece.to(found.entropy.dtype)
            top = wide.amax(-1, keepdim=True)
            seen = found.in_sight(wide, above=0.0) if masks else None
            w = wide / torch.where(top > 0, top, 1.0)
            found.see(place, w, w.clamp(min=torch.finfo(w.dtype).tiny).log(), seen)
        if own and bool((found.seen < whole.shape[-1]).any()):
            found.leave_padding((whole > 0).any(-2))
        self._count(found)

    def update_output(self, output: Tensor) -> None:
        """See the outputs (..., H, L, V) of the call seen last: what each head gives where it counted."""
        sighted = self._sighted
        rows = output.reshape(-1, *output.shape[-3:])
        if self._places is not None:
            rows = rows[..., self._places, :]
        wide = torch.promote_types(rows.dtype, torch.float32)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)
        if sighted is not None and sighted.shape == norms.shape:
            norms = torch.where(sighted, norms, 0.0)
            self.nonfinite = self.nonfinite or not bool(norms.sum().isfinite())  # of a query that counts
            self.outputs += sighted.sum((0, 2)).cpu()
        else:
            self.outputs += len(norms) * norms.shape[-1]
        self.norm += norms.sum((0, 2), dtype=torch.float64).cpu()

    def _count(self, found: Queries) -> None:
        """Add what the queries of one call have shown."""
        h, seen = found.entropy.clamp_(min=0), found.seen
        sighted = seen >= 1
        if not bool(h.sum().isfinite()):  # the entropy of a query that sees nothing is NaN, too
            sighted = sighted & h.isfinite()
            self.nonfinite = self.nonfinite or bool(((seen >= 1) & ~sighted).any())
        self._sighted, self._places = sighted, found.places if found.sampled else None
        self.sampled = self.sampled or found.sampled
        counted = sighted.sum((0, 2)).cpu()
        self.queries += counted
        self.passed += found.passed if found.sampled else int(counted.sum())
        self.first += torch.where(sighted, found.first, 0.0).sum((0, 2), dtype=torch.float64).cpu()
        share = torch.where(sighted, 1 / seen.clamp(min=1), 0.0)
        self.uniform += share.sum((0, 2), dtype=torch.float64).cpu()
        if found.square:
            self.aligned += counted
            self.diagonal += torch.where(sighted, found.own, 0.0).sum((0, 2), dtype=torch.float64).cpu()
        real = sighted & (seen >= 2)
        self.measured += real.sum((0, 2)).cpu()
        most = seen.clamp(min=2).log()
        self.normalized += torch.where(real, h / most, 0.0).sum((0, 2), dtype=torch.float64).cpu()
        self.hard += ((found.top >= self._thresholds.hard) & real).sum((0, 2)).cpu()
        everything = bool(real.all())
        self.entropy.update(h if everything else h[real])
        self.largest.update(found.top if everything else found.top[real])
        for step, name, some in ((0, "half", found.half), (1, "double", found.double)):
            counts = real[..., :: found.step] & some.isfinite()
            ratio = torch.where(counts, some / most[..., :: found.step], 0.0)
            setattr(self, name, getattr(self, name) + float(ratio.sum(dtype=torch.float64)))
            self.scaled += int(counts.sum()) if step == 0 else 0

    def merge(self, other: AttentionHeads) -> None:
        """Add what another probe shard has shown."""
        sums = "queries measured normalized first diagonal hard uniform aligned norm outputs passed scaled half double"
        for name in sums.split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.entropy.merge(other.entropy)
        self.largest.merge(other.largest)
        self.sampled = self.sampled or other.sampled
        self.nonfinite = self.nonfinite or other.nonfinite

    def responsibility(self) -> Responsibility:
        """Return the statistics of the row and of every head."""
        found = Responsibility(self.passed)
        total = float(self.measured.sum())
        found.sampled = int(self.queries.sum()) if self.sampled else None
        if not total:
            return found
        h = self.entropy
        found.entropy = EntropySummary(
            h.mean, h.minimum, h.quantile(0.05), h.quantile(0.5), h.quantile(0.95), h.maximum
        )
        found.normalized_entropy = float(self.normalized.sum()) / total
        found.max = MaxSummary(self.largest.mean, self.largest.quantile(0.95))
        found.hard_fraction = float(self.hard.sum()) / total
        if self.scaled:
            some = self.scaled if self.scaled < total else None
            found.temperature = Temperature(self.half / self.scaled, self.double / self.scaled, some)
        found.heads = [self._head(i) for i in range(self.heads)]
        return found

    def _head(self, i: int) -> Head:
        queries, measured, aligned = (float(t[i]) for t in (self.queries, self.measured, self.aligned))
        norms = torch.where(self.outputs > 0, self.norm / self.outputs.clamp(min=1), 0.0)
        layer = float(norms.mean())
        return Head(
            float(self.normalized[i]) / measured if measured else None,
            float(self.first[i]) / queries if queries else None,
            float(self.diagonal[i]) / aligned if aligned else None,
            float(self.hard[i]) / measured if measured else None,
            float(norms[i]) / layer if layer else None,
            float(self.uniform[i]) / queries if queries else None,
        )


def _largest(vectors: Tensor) -> Tensor:
    """Return the largest norm (N, H) among vectors (N, H, L, E): a product of two is no larger than that of theirs."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=wide)
    return norms.amax(-1)


def _hide(scores: Tensor, mask: Tensor | None, later: Tensor | None) -> Tensor | None:
    """Add a mask (n, h, l, S), broadcastable, to scores in place; return how many keys it leaves. None: all."""
    last = scores.shape[-1]
    if mask is not None:
        mask = mask[..., :last] if mask.shape[-1] > 1 else mask
        shown = mask if mask.dtype == torch.bool else mask > -MASKED
        scores += torch.where(shown, 0.0 if mask.dtype == torch.bool else mask.to(scores.dtype), _HIDDEN)
        if later is None:
            return shown.expand(*shown.shape[:-1], last).sum(-1)
        shown = shown & ~later
        scores.masked_fill_(later, _HIDDEN)
        return shown.sum(-1)
    if later is not None:
        scores.masked_fill_(later, _HIDDEN)
        return (~later).sum(-1)
    return None


def _one_lead(mask: Tensor, lead: torch.Size) -> Tensor:
    """Return a mask broadcastable to (*lead, H, L, S) as one of (N or 1, H or 1, L or 1, S or 1)."""
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.dim() == 4 and (len(lead) <= 1 or mask.shape[0] == 1):
        return mask
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _keys_in_sight(mask: Tensor, size: int, causal: int | None) -> Tensor:
    """Return which keys (n, H or 1, S) a mask (n, H or 1, L or 1, S) lets any query see.

    ``causal``: the number of queries, where query i sees no key beyond i either.
    """
    if causal is not None:
        shown = mask if mask.dtype == torch.bool else mask > -MASKED
        seen = shown.expand(*shown.shape[:-2], causal, size).tril().any(-2)
    else:
        seen = mask.any(-2) if mask.dtype == torch.bool else mask.amax(-2) > -MASKED
    return seen.expand(*seen.shape[:-1], size)


def _scores_in_sight(scores: Tensor, scale: float, far: float) -> Tensor:
    """Return which keys (N, H, S) any query sees, by scores (N, H, L, S); ``far`` below the best ones are a mask's."""
    best = scores.amax(-2) if scale > 0 else scores.amin(-2)
    if bool(best.isnan().any()):  # one bad query hides no key
        worst = -math.inf if scale > 0 else math.inf
        known = torch.where(scores.isnan(), worst, scores)
        best = known.amax(-2) if scale > 0 else known.amin(-2)
    best = best.float() * scale
    return (best > -math.inf) & (best >= best.amax(-1, keepdim=True) - far)


@contextmanager
def exact_products() -> Iterator[None]:
    """Products in full float32 in the body, whatever the process allows for speed (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
