"""K alternatives: load, entropy, information, who is dead and who starves.

H(r) = -sum_k r_k log r_k; load_k = mean_n r_nk; effective components = exp H(load); information = H(mean r) - mean H(r),
the mutual information of input and component. All in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emscan.measure.histogram import Histogram
from emscan.report.document import Components, EntropySummary, MaxSummary, Responsibility, Thresholds

_MASKED = 5e3  # an energy this far below the best is a mask's, not a score


def visible_alternatives(scores: Tensor, axis: int) -> Tensor:
    """Return which alternatives a mask has left: finite scores not absurdly far below the best."""
    best = scores.amax(axis, keepdim=True)
    return torch.isfinite(scores) & (scores >= best - _MASKED)


def entropy(r: Tensor) -> Tensor:
    """Return H over the last axis, in nats; 0 log 0 = 0."""
    return torch.special.entr(r).sum(-1)


class Alternatives:
    """Streamed statistics of responsibilities over ``count`` alternatives.

    ``persistent``: index k is the same alternative in every competition, so loads make sense.
    """

    def __init__(self, count: int, persistent: bool, thresholds: Thresholds) -> None:
        self.count, self.persistent, self._thresholds = count, persistent, thresholds
        self.competitions = 0  # all of them
        self.measured = 0  # with two alternatives or more in sight
        self.hard = 0
        self.mass = torch.zeros(count if persistent else 0, dtype=torch.float64)
        self.alive = torch.zeros(count if persistent else 0, dtype=torch.bool)
        self.assignments = torch.zeros(count if persistent else 0, dtype=torch.int64)
        self.picks = 0  # rows of assignments seen
        self.square = torch.zeros(count if persistent else 0, dtype=torch.float64)
        self.shift: Tensor | None = None
        self.first = torch.zeros(count if persistent else 0, dtype=torch.float64)
        self.variants = 0
        self.entropy = Histogram(0.0, math.log(max(2, count)))
        self.normalized = 0.0
        self.largest = Histogram(0.0, 1.0)
        self.nonfinite = False

    def update(self, r: Tensor, axis: int = -1, visible: Tensor | None = None) -> None:
        """See responsibilities (..., K, ...) with the alternatives along ``axis``; ``visible``: bool, broadcastable."""
        rows = r.movedim(axis, -1)
        shown = visible.expand(r.shape).movedim(axis, -1) if visible is not None else None
        width = rows.shape[-1]
        rows = rows.reshape(-1, width)
        shown = shown.reshape(-1, width) if shown is not None else None
        step = max(1, (1 << 18) // max(1, width))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            self._update(part, shown[start : start + step] if shown is not None else None)

    def _update(self, rows: Tensor, shown: Tensor | None) -> None:
        wide = rows.double() if self.persistent or rows.dtype == torch.float64 else rows.float()
        finite = torch.isfinite(wide).all(-1)
        if not bool(finite.all()):
            self.nonfinite = True
            wide, shown = wide[finite], shown[finite] if shown is not None else None
        self.competitions += len(wide)
        if self.persistent:
            self.mass += wide.sum(0).cpu()
            self.alive |= (wide != 0).any(0).cpu()
        seen = shown.sum(-1) if shown is not None else torch.full((len(wide),), wide.shape[-1], device=wide.device)
        real = seen >= 2
        if not bool(real.all()):
            wide, seen = wide[real], seen[real]
        if not len(wide):
            return
        self.measured += len(wide)
        h, best = entropy(wide), wide.amax(-1)
        self.entropy.update(h)
        self.normalized += float((h.double() / seen.double().log()).sum())
        self.largest.update(best)
        self.hard += int((best >= self._thresholds.hard).sum())

    def update_assignments(self, chosen: Tensor) -> None:
        """See the indices that were really picked: (..., k), or any shape for one pick each."""
        flat = chosen.flatten()
        self.assignments += torch.bincount(flat, minlength=self.count)[: self.count].cpu()
        self.picks += flat.numel()

    def update_energies(self, scores: Tensor, axis: int = -1) -> None:
        """See the scores themselves, for the variance of each component over the probe."""
        rows = scores.movedim(axis, -1).reshape(-1, scores.shape[axis]).double().cpu()
        rows = rows[torch.isfinite(rows).all(-1)]
        if not len(rows):
            return
        if self.shift is None:
            self.shift = rows[0].clone()  # sums of squares around a typical value lose no digits
        centred = rows - self.shift
        self.first += centred.sum(0)
        self.square += centred.square().sum(0)
        self.variants += len(rows)

    def merge(self, other: Alternatives) -> None:
        """Add what another probe shard has shown."""
        for name in ("competitions", "measured", "hard", "picks", "normalized"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mass += other.mass
        self.alive |= other.alive
        self.assignments += other.assignments
        self.entropy.merge(other.entropy)
        self.largest.merge(other.largest)
        self.nonfinite = self.nonfinite or other.nonfinite
        if other.shift is None:
            return
        if self.shift is None:
            self.shift = other.shift.clone()
        move = other.shift - self.shift
        self.square += other.square + 2 * move * other.first + other.variants * move.square()
        self.first += other.first + other.variants * move
        self.variants += other.variants

    @property
    def variance(self) -> Tensor | None:
        """Variance of each component's score over the probe (population)."""
        if self.variants < 2:
            return None
        return (self.square / self.variants - (self.first / self.variants).square()).clamp(min=0)

    @property
    def soft_load(self) -> Tensor | None:
        """Mean responsibility of each alternative, sums to 1."""
        return self.mass / self.competitions if self.persistent and self.competitions else None

    @property
    def load(self) -> Tensor | None:
        """Share of the assignments where something was picked, else mean responsibility; sums to 1."""
        if self.persistent and self.picks:
            return self.assignments.double() / self.picks
        return self.soft_load

    def information(self) -> float | None:
        """Mutual information of input and component, from the posterior."""
        soft, mean = self.soft_load, self.entropy.mean
        if soft is None or mean is None:
            return None
        total = float(soft.sum())
        return max(0.0, float(entropy(soft / total if total > 0 else soft)) - mean)

    def components(self, kind: str, *, hard: bool) -> Components | None:
        """Return the lists of the report; None where alternatives have no identity. ``hard``: zeros are exact by design."""
        load = self.load
        if load is None:
            return None
        uniform = 1 / self.count
        gone = (self.assignments == 0) if self.picks else ~self.alive
        dead = gone if hard else torch.zeros_like(gone)
        starved = (load < self._thresholds.starved * uniform) & ~dead
        variance = self.variance
        both = bool(self.picks and self.competitions)
        return Components(
            kind,
            self.count,
            dead=dead.nonzero().flatten().tolist(),
            starved=starved.nonzero().flatten().tolist(),
            load=load.tolist(),
            soft_load=self.soft_load.tolist() if both and self.soft_load is not None else None,
            variance=variance.tolist() if variance is not None else None,
        )

    def responsibility(self, *, router: bool = False) -> Responsibility:
        """Return the statistics of the row."""
        load = self.load
        h = self.entropy
        found = Responsibility(self.competitions or self.picks)
        if load is not None and float(load.sum()) > 0:
            shares = load / load.sum()
            found.effective_components = math.exp(float(entropy(shares)))
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
