"""K alternatives: load, entropy, information, who is dead and who starves.

H(r) = -sum_k r_k log r_k; load_k = mean_n r_nk; effective components = exp H(load). The mutual information of input and
component is H(mean r) - mean H(r). All in nats. From scores s: log Z = max s - log max r, H = log Z - sum_k r_k s_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from emscan.measure.chunks import pieces_of
from emscan.measure.histogram import Histogram
from emscan.measure.moments import Moments
from emscan.report.document import Components, EntropySummary, MaxSummary, Responsibility, Thresholds

MASKED = 5e3  # an energy this far below the best is a mask's, not a score
_EXACT = 1 << 20  # responsibilities of a row measured in float64; in as many more, float32 rounding averages out


def visible_alternatives(scores: Tensor, axis: int) -> Tensor | None:
    """Return which alternatives a mask has left: finite scores not absurdly far below the best. None: all of them."""
    low, high = (float(end) for end in torch.aminmax(scores)) if scores.numel() else (0.0, 0.0)
    if high - low < MASKED:
        return None
    best = scores.amax(axis, keepdim=True)
    return torch.isfinite(scores) & (scores >= best - MASKED)


def entropy(r: Tensor) -> Tensor:
    """Return H over the last axis, in nats; 0 log 0 = 0."""
    return -(r * r.clamp(min=torch.finfo(r.dtype).tiny).log()).sum(-1)


class Alternatives:
    """Streamed statistics of responsibilities over ``count`` alternatives.

    ``persistent``: index k is the same alternative in every competition, so loads make sense.
    """

    def __init__(self, count: int, persistent: bool, thresholds: Thresholds) -> None:
        self.count, self.persistent, self._thresholds = count, persistent, thresholds
        kept = count if persistent else 0
        self.seen = 0  # responsibilities
        self.competitions = 0  # with at least one alternative in sight
        self.measured = 0  # with two or more
        self.hard = 0
        self.mass = torch.zeros(kept, dtype=torch.float64)
        self.used = torch.zeros(kept, dtype=torch.int64)  # responsibilities that are not exactly 0
        self.emitted = 0  # competitions whose own responsibilities were seen, not only their scores
        self.shares = True  # whether all of these summed to one
        self.assignments = torch.zeros(kept, dtype=torch.int64)
        self.picks = 0  # rows of assignments seen
        self.moments = Moments(kept)
        self.entropy = Histogram(0.0, math.log(max(2, count)))
        self.normalized = 0.0
        self.largest = Histogram(0.0, 1.0)
        self.nonfinite = False

    def update(self, r: Tensor, axis: int = -1, visible: Tensor | None = None) -> None:
        """See responsibilities (..., K, ...) with the alternatives along ``axis``; ``visible``: bool, broadcastable.

        Amounts that do not sum to one count as shares |r| / sum |r|; where all are 0 there is no competition.
        """
        for rows, shown in self._rows(r, axis, visible):
            size = rows.abs()
            total = size.sum(-1, keepdim=True)
            real = (total > 0).squeeze(-1) & total.isfinite().squeeze(-1)
            if not bool(real.all()):
                self.nonfinite = self.nonfinite or not bool(total.isfinite().all())
                size, total, shown = size[real], total[real], shown[real] if shown is not None else None
            if self.persistent:
                self.used += (size != 0).sum(0).cpu()
                self.emitted += len(size)
                self.shares = self.shares and bool(((total - 1).abs() <= 0.02).all())
            share = size.div_(total)
            self._count(entropy(share), share.amax(-1), share.sum(0) if self.persistent else None, shown, r.shape[axis])

    def update_scores(self, scores: Tensor, axis: int = -1, *, scale: float = 1.0, masks: bool = True) -> None:
        """See scores s with r = softmax(scale * s) along ``axis``; ``masks``: those absurdly far below are masked."""
        for part, _ in self._rows(scores, axis, None):
            rows = part if scale == 1.0 else part * scale
            shown = visible_alternatives(rows, -1) if masks else None
            below = rows - rows.amax(-1, keepdim=True)
            weight = below.exp()  # exactly 0 so far below the best
            if shown is not None:
                below.masked_fill_(~shown, 0.0)  # 0 times -inf is NaN
            total = weight.sum(-1)
            top = 1 / total
            h = total.log() - below.mul_(weight).sum(-1) * top
            real = h.isfinite()
            if not bool(real.all()):
                # a row of nothing but -inf is fully masked: no competition, and nothing wrong
                self.nonfinite = self.nonfinite or not bool((rows < math.inf).all())
                h, top, weight, shown = h[real], top[real], weight[real], shown[real] if shown is not None else None
            self._count(h.clamp_(min=0), top, top @ weight if self.persistent else None, shown, scores.shape[axis])

    def _rows(self, tensor: Tensor, axis: int, visible: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield rows (n, K) in float32 at least, in float64 at first, and which of them are visible."""
        axis %= tensor.dim()
        both = (tensor,) if visible is None else (tensor, visible.expand(tensor.shape))
        for parts in pieces_of(both, (axis,)):
            rows, *shown = (part.movedim(axis, -1).reshape(-1, tensor.shape[axis]) for part in parts)
            exact = tensor.dtype == torch.float64 or self.seen < _EXACT
            self.seen += rows.numel()
            yield rows.to(torch.float64 if exact else torch.float32), shown[0] if shown else None

    def _count(self, h: Tensor, top: Tensor, mass: Tensor | None, shown: Tensor | None, width: int) -> None:
        self.competitions += len(h)
        if mass is not None:
            self.mass += mass.cpu()
        if shown is None:
            if width < 2:
                return
            self.normalized += float(h.sum()) / math.log(width)
        else:
            seen = shown.sum(-1)
            real = seen >= 2
            h, top, seen = h[real], top[real], seen[real]
            self.normalized += float((h / seen.to(h.dtype).log()).sum())
        self.measured += len(h)
        self.entropy.update(h)
        self.largest.update(top)
        self.hard += int((top >= self._thresholds.hard).sum())

    def update_assignments(self, chosen: Tensor) -> None:
        """See the indices that were really picked: (..., k), or any shape for one pick each."""
        flat = chosen.flatten()
        flat = flat[flat >= 0]  # -1 stands for a sample that no alternative took
        self.assignments += torch.bincount(flat, minlength=self.count)[: self.count].cpu()
        self.picks += flat.numel()

    def update_energies(self, scores: Tensor, axis: int = -1) -> None:
        """See the scores themselves, for the variance of each component over the probe."""
        self.moments.update(scores, axis)

    def merge(self, other: Alternatives) -> None:
        """Add what another probe shard has shown."""
        for name in ("seen", "competitions", "measured", "hard", "emitted", "picks", "normalized"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mass += other.mass
        self.used += other.used
        self.shares = self.shares and other.shares
        self.assignments += other.assignments
        self.moments.merge(other.moments)
        self.entropy.merge(other.entropy)
        self.largest.merge(other.largest)
        self.nonfinite = self.nonfinite or other.nonfinite

    @property
    def soft_load(self) -> Tensor | None:
        """Mean responsibility of each alternative, sums to 1."""
        return self.mass / self.competitions if self.persistent and self.competitions else None

    @property
    def load(self) -> Tensor | None:
        """Share of the assignments where something was picked, else mean responsibility; sums to 1.

        Where what was handed out are amounts that do not sum to one, each that is not 0 is an assignment.
        """
        if self.persistent and self.picks:
            return self.assignments.double() / self.picks
        if self.persistent and not self.shares:
            return self.used.double() / int(self.used.sum())
        return self.soft_load

    def information(self) -> float | None:
        """Mutual information of input and component, from the posterior."""
        soft, mean = self.soft_load, self.entropy.mean
        if soft is None or mean is None:
            return None
        total = float(soft.sum())
        return max(0.0, float(entropy(soft / total if total > 0 else soft)) - mean)

    def components(self, kind: str, *, hard: bool) -> Components | None:
        """Return the lists of the report; None where alternatives have no identity. ``hard``: zeros are by design."""
        load = self.load
        if load is None:
            return None
        uniform = 1 / self.count
        gone = (self.assignments == 0) if self.picks else (self.used == 0)
        dead = gone if hard and (self.picks or self.emitted) else torch.zeros_like(gone)
        starved = (load < self._thresholds.starved * uniform) & ~dead
        variance = self.moments.variance
        both = bool(self.picks and self.competitions)
        return Components(
            kind,
            self.count,
            dead=dead.nonzero().flatten().tolist(),
            starved=starved.nonzero().flatten().tolist(),
            load=load.tolist(),
            soft_load=self.soft_load.tolist() if both and self.soft_load is not None else None,
            variance=variance.tolist() if variance is not None else None,
            redundancy=self.moments.redundancy,
        )

    def responsibility(self, *, router: bool = False) -> Responsibility:
        """Return the statistics of the row."""
        load = self.load
        h = self.entropy
        found = Responsibility(self.competitions or self.picks)
        if load is not None and float(load.sum()) > 0:
            shares = load / load.sum()
            found.load_entropy = float(entropy(shares))
            found.effective_components = math.exp(found.load_entropy)
            found.max_violation = float(load.max()) * self.count - 1 if router else None
        if not self.measured:
            return found
        found.entropy = EntropySummary(
            h.mean, h.minimum, h.quantile(0.05), h.quantile(0.5), h.quantile(0.95), h.maximum
        )
        found.normalized_entropy = self.normalized / self.measured
        found.information = self.information()
        found.max = MaxSummary(self.largest.mean, self.largest.quantile(0.95))
        found.hard_fraction = self.hard / self.measured
        return found
