"""What the queries of one attention call have shown, looked at in pieces that stay small.

Beyond 2,048 keys, a fixed number of queries per sequence is looked at, evenly spaced, against all their keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from emscan.measure.alternatives import MASKED

EXACT = 2048  # keys up to which every query is measured
SAMPLED = 512  # queries per sequence that are measured beyond
_SCALED = 8  # queries per sequence whose entropy is taken at other temperatures, too
_SCORES = 1 << 20  # scores alive at a time: 4 MiB, and as much for their exponentials
# scores within MILD of 0, of MANY keys: log Z and E[s] are then so near to H >= MANY * exp(-2 MILD) * 2 MILD that their
# difference is right to 1e-4 in float32
MILD, MANY = 6.0, 512
_LEAST, _ROOT = -87.0, 1e-19  # log of the least share that is told from 0: exp takes ten times as long below

Place = tuple[slice, slice, slice]  # samples, heads, queries (of those that are measured)


class Queries:
    """What the measured queries of one call have shown, (N, H, M): counted once, since pieces of scores are many."""

    def __init__(
        self, samples: int, heads: int, length: int, size: int, device: torch.device, dtype: torch.dtype,
        beside: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        self.sampled = size > EXACT and length > SAMPLED
        self.places = torch.arange(length, device=device)  # of the queries that are measured
        if self.sampled:
            self.places = ((torch.arange(SAMPLED, device=device) + 0.5) * (length / SAMPLED)).long()
        self._shape = samples, heads, len(self.places), size
        made = torch.zeros(4, *self._shape[:3], device=device, dtype=dtype)
        self.entropy, self.top, self.first, self.own = made
        self.seen = torch.full_like(self.top, size)
        self.keys = slice(beside[0], size - beside[1])  # among the alternatives
        self._beside = any(beside)
        self.square = length == size - sum(beside)
        self.passed = samples * heads * length
        self.step = max(1, len(self.places) // _SCALED)
        few = (len(self.places) - 1) // self.step + 1
        self.half, self.double = torch.zeros(2, samples, heads, few, device=device, dtype=dtype)
        self.hidden = self.nonfinite = False

    @classmethod
    def of(cls, whole: Tensor, beside: tuple[int, int]) -> Queries:
        """Return room for the queries of scores or weights (N, H, L, S)."""
        samples, heads, length, size = whole.shape
        wide = torch.promote_types(whole.dtype, torch.float32)
        return cls(samples, heads, length, size, whole.device, wide, beside)

    def blocks(self) -> Iterator[Place]:
        """Yield which scores to look at together: whole samples, or some heads of one, or some queries of one head."""
        samples, heads, length, size = self._shape
        rows = max(1, min(length, _SCORES // size))
        together = max(1, _SCORES // (rows * size))  # heads, of one or of several samples
        per = max(1, together // heads)
        part = min(heads, together)
        for sample in range(0, samples, per):
            for head in range(0, heads, part):
                for start in range(0, length, rows):
                    yield (
                        slice(sample, min(samples, sample + per)),
                        slice(head, min(heads, head + part)),
                        slice(start, min(length, start + rows)),
                    )

    def pieces(self, whole: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Yield the blocks of a tensor (N, H, L, S) that has everything."""
        for some, part, rows in self.blocks():
            yield (some, part, rows), whole[some, part][..., self.places[rows] if self.sampled else rows, :]

    def of_mask(self, mask: Tensor | None, some: slice, part: slice, rows: slice) -> Tensor | None:
        """Return the part of a mask (N or 1, H or 1, L or 1, S or 1) that goes with a block."""
        if mask is None:
            return None
        mask = mask[some] if mask.shape[0] > 1 else mask
        mask = mask[:, part] if mask.shape[1] > 1 else mask
        if mask.shape[2] > 1:
            mask = mask[:, :, self.places[rows] if self.sampled else rows]
        return mask

    def in_sight(self, numbers: Tensor, above: float = -MASKED) -> Tensor:
        """Return how many alternatives (..., S) a query has, by their scores or weights: none where it has no key."""
        shown = torch.gt(numbers, above, out=torch.empty_like(numbers))  # as floats: counted several times faster
        seen = shown.sum(-1)
        return seen * (shown[..., self.keys].amax(-1) > 0) if self._beside else seen

    def leave_padding(self, shown: Tensor) -> None:
        """Drop the queries of padding; ``shown``, (N or 1, H or 1, S), says which keys any query sees."""
        if self.square:
            self.seen *= shown[..., self.keys.start + self.places]

    def see_scores(self, place: Place, scores: Tensor, seen: Tensor | None) -> None:
        """See scores (n, h, l, S), which are overwritten; ``seen``: how many of the keys are no mask's."""
        below = scores.sub_(scores.amax(-1, keepdim=True)).clamp_(min=_LEAST)
        self.see(place, below.exp(), below, seen)

    def see_mild(self, place: Place, scores: Tensor) -> None:
        """See scores (n, h, l, S) within `MILD` of 0, which are overwritten: their exponentials need no maximum."""
        w = scores.exp()
        self.see(place, w, scores, None, w.amax(-1))

    def see_masked(self, place: Place, scores: Tensor, far: float) -> None:
        """See scores (n, h, l, S), which are overwritten; those ``far`` below the best are a mask's."""
        best = scores.amax(-1, keepdim=True)
        self.nonfinite = self.nonfinite or not bool((best < math.inf).all())
        best.clamp_(min=torch.finfo(scores.dtype).min)  # nothing but -inf: no key in sight
        below = scores.sub_(best)
        seen: Tensor | None = None
        if not bool(below.amin() > -far):  # NaN, too
            self.hidden = True
            seen = self.in_sight(below, -far)
        below.clamp_(min=_LEAST)
        self.see(place, below.exp(), below, seen)

    def see(self, place: Place, w: Tensor, below: Tensor, seen: Tensor | None, best: Tensor | float = 1.0) -> None:
        """See weights w = exp(below), the largest of each query being ``best``; ``below`` is overwritten."""
        some, part, rows = place
        if seen is not None:
            self.seen[place] = seen.to(self.seen.dtype)
        scaled = range(-rows.start % self.step, rows.stop - rows.start, self.step)
        if len(scaled):
            self._see_scaled((some, part), rows.start, scaled, w, below)
        total = w.sum(-1)
        self.entropy[place] = total.log() - below.mul_(w).sum(-1) / total
        top = best / total
        self.top[place] = top
        self.first[place] = w[..., self.keys.start] / total
        if self.square:
            own = (self.places[rows, None] + self.keys.start).expand(*w.shape[:-1], 1)
            self.own[place] = w.gather(-1, own).squeeze(-1) / total

    def _see_scaled(self, where: tuple[slice, slice], start: int, rows: range, w: Tensor, below: Tensor) -> None:
        """Take the entropy of a few queries with their scores halved and doubled."""
        chosen = slice(rows.start, rows.stop, rows.step)
        w, below = w[:, :, chosen], below[:, :, chosen]
        first = (start + rows.start) // self.step
        at = (*where, slice(first, first + len(rows)))
        whole = w.clamp(min=_ROOT)  # its square is no denormal, which takes ten times as long
        for target, scale, weight in ((self.half, 0.5, w.sqrt()), (self.double, 2.0, whole.square())):
            total = weight.sum(-1)
            target[at] = total.log() - scale * (below * weight).sum(-1) / total
