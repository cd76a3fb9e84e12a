"""Two-way competition inside units: r = sigmoid(u), u the log-odds of the two sides.

With q = sigmoid(-|u|), the share of the losing side: H(r) = |u| q - log(1 - q), in nats, exact to rounding on both
tails. H falls as |u| grows, so the distribution of |u| gives the quantiles of H and of max(r, 1 - r).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from emscan.measure.chunks import in_any_order, others, pieces, reduce_max, reduce_min, summed, unit_zeros
from emscan.measure.histogram import Histogram
from emscan.measure.units import Derivative, Underflow, compared
from emscan.report.document import EntropySummary, MaxSummary, Responsibility, Thresholds

Function = Callable[[Tensor], Tensor]

# |u| in bins so narrow that neither H (slope at most 0.224) nor max r (0.25) moves by more than 1/4,096 of its range
_SIZES = (0.0, 16.0, 1 << 15)


def entropy(u: float) -> float:
    """Return H(sigmoid(u)) in nats."""
    losing = math.exp(-abs(u)) / (1 + math.exp(-abs(u)))
    return abs(u) * losing - math.log1p(-losing)


class TwoWay:
    """Responsibilities of the upper side over all units and values; per unit, the range of u."""

    def __init__(self, rows: tuple[int, ...], thresholds: Thresholds, derivative: Derivative | None = None) -> None:
        count = len(rows)
        self.rows = rows
        self._odds = math.log(thresholds.saturated / (1 - thresholds.saturated))
        self._hard = math.log(thresholds.hard / (1 - thresholds.hard))
        self.values = 0
        self.mean = 0.0  # sum of r
        self.losing = 0.0  # sum of min(r, 1 - r)
        self.entropy = 0.0  # sum of H(r)
        self.saturated, self.hard = 0, 0
        self.on = torch.zeros(count, dtype=torch.int64)
        self.per_unit = 0
        self.low = torch.full((count,), math.inf, dtype=torch.float64)
        self.high = torch.full((count,), -math.inf, dtype=torch.float64)
        self._moves = torch.zeros(count, dtype=torch.bool)  # known to leave both ends: neither frozen nor dead
        self.underflow = Underflow(count, derivative) if derivative is not None else None
        self.sizes = Histogram(*_SIZES)
        self.nonfinite = False

    def update(self, z: Tensor, unit_dims: tuple[int, ...], odds_of: Function | None = None) -> None:
        """See energies z with log-odds ``odds_of(z)`` (z itself without it); ``unit_dims`` index the units."""
        gone = others(z, unit_dims)
        on = unit_zeros(z, unit_dims)
        for part in pieces(z, unit_dims):
            wide = part if part.dtype in {torch.float32, torch.float64} else part.float()
            odds = odds_of(wide) if odds_of is not None else wide
            upper = compared(odds, 0.0)
            on += summed(upper, gone)
            if not self._add(odds, upper):
                self.nonfinite = True
                real = odds[~odds.isnan()].clamp(-1e4, 1e4)
                self._add(real, compared(real, 0.0))
            if not bool(self._moves.all()):
                self._range(odds, unit_dims)
        self.on += on.flatten().to("cpu", torch.int64)
        self.per_unit += z.numel() // len(self.rows)

    def _add(self, odds: Tensor, upper: Tensor) -> bool:
        """Add to the sums over all units, ``upper`` being 1 where odds > 0; False, with nothing added, if not finite."""
        size = odds.abs()
        losing = torch.sigmoid(-size)
        spread = float((size * losing).sum())
        if not math.isfinite(spread):
            return False
        total = float(losing.sum())
        # on the upper side r is 1 - losing
        self.mean += total + float(upper.sum()) - 2 * float(upper.mul_(losing).sum())
        self.losing += total
        self.entropy += spread - _sum_log1p(losing)
        saturated = int(compared(size, self._odds, or_equal=True).sum())
        self.saturated += saturated
        self.hard += saturated if self._hard == self._odds else int((size >= self._hard).sum())
        self.sizes.update(size)
        self.values += odds.numel()
        return True

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
        self.mean, self.losing = self.mean + other.mean, self.losing + other.losing
        self.entropy += other.entropy
        self.saturated, self.hard = self.saturated + other.saturated, self.hard + other.hard
        self.on, self.per_unit = self.on + other.on, self.per_unit + other.per_unit
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self._moves |= other._moves
        if self.underflow is not None and other.underflow is not None:
            self.underflow.alive |= other.underflow.alive
        self.sizes.merge(other.sizes)
        self.nonfinite = self.nonfinite or other.nonfinite

    def dead(self) -> list[int]:
        """Return the units whose derivative is exactly 0, by underflow, on every value."""
        if self.underflow is None or not self.values:
            return []
        return sorted(row for row, alive in zip(self.rows, self.underflow.alive.tolist(), strict=True) if not alive)

    def on_rate(self) -> list[float | None]:
        """Return, per unit, the share of values on which the upper side has more than half."""
        return (self.on.double() / max(1, self.per_unit)).tolist()

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
            whole.mean, whole.losing = whole.mean + part.mean, whole.losing + part.losing
            whole.entropy += part.entropy
            whole.saturated, whole.hard = whole.saturated + part.saturated, whole.hard + part.hard
            whole.sizes.merge(part.sizes)
            whole.nonfinite = whole.nonfinite or part.nonfinite
        return whole

    def responsibility(self) -> Responsibility:
        """Return the statistics of the row; competitions are values."""
        if not self.values:
            return Responsibility(0)
        n, sizes = self.values, self.sizes
        # H falls as |u| grows: its 5 % quantile is at the 95 % quantile of |u|
        ends = (sizes.maximum, sizes.quantile(0.95), sizes.quantile(0.5), sizes.quantile(0.05), sizes.minimum)
        low, p05, median, p95, high = (entropy(size) if size is not None else None for size in ends)
        larger = 1 - 1 / (1 + math.exp(min(ends[1] or 0.0, 700.0)))
        return Responsibility(
            n,
            EntropySummary(self.entropy / n, low, p05, median, p95, high),
            normalized_entropy=self.entropy / n / math.log(2),
            max=MaxSummary(1 - self.losing / n, larger),
            hard_fraction=self.hard / n,
            saturated=self.saturated / n,
            mean=self.mean / n,
        )


def _sum_log1p(q: Tensor) -> float:
    """Return the sum of log(1 - q) for q in [0, 1/2], at one logarithm for four values.

    1 - (1 - a)(1 - b) = a + b - ab loses no digits where a and b are small.
    """
    flat = in_any_order(q)
    whole = flat.numel() // 4 * 4
    total = float(torch.log1p(-flat[whole:]).sum())
    for _ in range(2):
        half = whole // 2
        first, second = flat[:half], flat[half:whole]
        flat, whole = torch.addcmul(first + second, first, second, value=-1), half
    return total + float(torch.log1p(flat.neg_()).sum())


def underflow(gate: Function, dtype: torch.dtype) -> Function:
    """Return the derivative of a gate in the model's dtype: z (float64) -> dh/dz, exactly 0 where it underflows."""

    def at(z: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            point = z.to(dtype).clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(gate(point).sum(), point)
        return gradient.double()

    return at
