"""Two-way competition inside units: r = sigmoid(u), u the log-odds of the two sides.

H(r) = log(1 + e) + |u| e / (1 + e) with e = exp(-|u|): exact to rounding on both tails, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from emscan.measure.chunks import pieces, reduce_max, reduce_min, reduce_sum
from emscan.measure.histogram import Histogram
from emscan.measure.units import Derivative, Underflow, count_above
from emscan.report.document import EntropySummary, MaxSummary, Responsibility, Thresholds


Function = Callable[[Tensor], Tensor]


def entropy(u: Tensor) -> Tensor:
    """Return H(sigmoid(u)) in nats, entry by entry."""
    size = u.abs()
    small = torch.exp(-size)
    return torch.log1p(small) + size * (small / (1 + small))


class TwoWay:
    """Responsibilities of the upper side over all units and values; per unit, the range of u."""

    def __init__(
        self, rows: tuple[int, ...], thresholds: Thresholds, derivative: Derivative | None = None
    ) -> None:
        count = len(rows)
        self.rows = rows
        self._odds = math.log(thresholds.saturated / (1 - thresholds.saturated))
        self._hard = math.log(thresholds.hard / (1 - thresholds.hard))
        self.values = 0
        self.mean = 0.0
        self.share = 0.0  # sum of max(r, 1 - r)
        self.saturated, self.hard = 0, 0
        self.on = torch.zeros(count, dtype=torch.int64)
        self.per_unit = 0
        self.low = torch.full((count,), math.inf, dtype=torch.float64)
        self.high = torch.full((count,), -math.inf, dtype=torch.float64)
        self._moves = torch.zeros(count, dtype=torch.bool)  # known to leave both ends: neither frozen nor dead
        self.underflow = Underflow(count, derivative) if derivative is not None else None
        self.entropy = Histogram(0.0, math.log(2.0))
        self.nonfinite = False

    def update(self, z: Tensor, unit_dims: tuple[int, ...], odds_of: Function | None = None) -> None:
        """See energies z with log-odds ``odds_of(z)`` (z itself without it); ``unit_dims`` index the units."""
        for part in pieces(z, unit_dims):
            wide = part if part.dtype in {torch.float32, torch.float64} else part.float()
            odds = odds_of(wide) if odds_of is not None else wide
            self.on += count_above(odds, 0.0, unit_dims)
            self.per_unit += part.numel() // len(self.rows)
            if not bool(self._moves.all()):
                self._range(odds, unit_dims)
            total = float(torch.sigmoid(odds).sum(dtype=torch.float64))
            self.nonfinite = self.nonfinite or not math.isfinite(total)
            self.mean += total
            size = odds.abs()
            self.share += float(torch.sigmoid(size).sum(dtype=torch.float64))
            everything = tuple(range(part.dim()))
            saturated = int(count_above(size, self._odds, everything, or_equal=True).sum())
            self.saturated += saturated
            self.hard += saturated if self._hard == self._odds else int((size >= self._hard).sum())
            self.entropy.update(entropy(odds))
            self.values += part.numel()

    def _range(self, odds: Tensor, unit_dims: tuple[int, ...]) -> None:
        """Follow the range of every unit until all are known to move: in a sound network, one piece."""
        self.low = torch.minimum(self.low, reduce_min(odds, unit_dims))
        self.high = torch.maximum(self.high, reduce_max(odds, unit_dims))
        self._moves = (self.low < self._odds) & (self.high > -self._odds)
        if self.underflow is not None:
            self.underflow.update(odds, unit_dims)
            self._moves &= self.underflow.alive

    def merge(self, other: TwoWay) -> None:
        """Add what another probe shard has shown."""
        self.values += other.values
        self.mean, self.share = self.mean + other.mean, self.share + other.share
        self.saturated, self.hard = self.saturated + other.saturated, self.hard + other.hard
        self.on, self.per_unit = self.on + other.on, self.per_unit + other.per_unit
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self._moves |= other._moves
        if self.underflow is not None and other.underflow is not None:
            self.underflow.alive |= other.underflow.alive
        self.entropy.merge(other.entropy)
        self.nonfinite = self.nonfinite or other.nonfinite

    def dead(self) -> list[int]:
        """Return the units whose derivative is exactly 0, by underflow, on every value."""
        if self.underflow is None or not self.values:
            return []
        return sorted(row for row, alive in zip(self.rows, self.underflow.alive.tolist(), strict=True) if not alive)

    def frozen(self) -> list[int]:
        """Return the units whose r stays at or beyond 0.99 of one side on every value."""
        if not self.values:
            return []
        stays = (self.low >= self._odds) | (self.high <= -self._odds)
        return sorted(row for row, flag in zip(self.rows, stays.tolist(), strict=True) if flag)

    @classmethod
    def joined(cls, parts: list[TwoWay], thresholds: Thresholds) -> TwoWay:
        """Return one accumulator for disjoint sets of units of one layer."""
        whole = cls(tuple(row for part in parts for row in part.rows), thresholds)
        low, high, on = [part.low for part in parts], [part.high for part in parts], [part.on for part in parts]
        whole.low, whole.high, whole.on = torch.cat(low), torch.cat(high), torch.cat(on)
        whole.per_unit = max((part.per_unit for part in parts), default=0)
        for part in parts:
            whole.values += part.values
            whole.mean, whole.share = whole.mean + part.mean, whole.share + part.share
            whole.saturated, whole.hard = whole.saturated + part.saturated, whole.hard + part.hard
            whole.entropy.merge(part.entropy)
            whole.nonfinite = whole.nonfinite or part.nonfinite
        return whole

    def responsibility(self) -> Responsibility:
        """Return the statistics of the row; competitions are values."""
        if not self.values:
            return Responsibility(0)
        h = self.entropy
        quantiles = [h.quantile(q) for q in (0.05, 0.5, 0.95)]
        summary = EntropySummary(h.mean, h.minimum, quantiles[0], quantiles[1], quantiles[2], h.maximum)
        return Responsibility(
            self.values,
            summary,
            normalized_entropy=h.mean / math.log(2) if h.mean is not None else None,
            max=MaxSummary(self.share / self.values, _larger_share(quantiles[0])),
            hard_fraction=self.hard / self.values,
            saturated=self.saturated / self.values,
            mean=self.mean / self.values,
        )


def _larger_share(nats: float | None) -> float | None:
    """Return max(r, 1 - r) of the two-way distribution with this entropy (bisection; entropy falls as it grows)."""
    if nats is None:
        return None
    low, high = 0.5, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        rest = 1 - middle
        value = -middle * math.log(middle) - (rest * math.log(rest) if rest > 0 else 0.0)
        low, high = (middle, high) if value > nats else (low, middle)
    return (low + high) / 2


def underflow(gate: Function, dtype: torch.dtype) -> Function:
    """Return the derivative of a gate as the model's dtype has it: z (float64) -> dh/dz, exactly 0 where it underflows."""

    def at(z: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            point = z.to(dtype).clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(gate(point).sum(), point)
        return gradient.double()

    return at
