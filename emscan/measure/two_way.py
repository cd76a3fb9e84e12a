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
from emscan.report.document import EntropySummary, MaxSummary, Responsibility, Temperature, Thresholds

Function = Callable[[Tensor], Tensor]

# |u| in bins so narrow that neither H (slope at most 0.224) nor max r (0.25) moves by more than 1/4,096 of its range
_BINS, _WIDTH = 1 << 14, 24.0 / (1 << 14)
_EXACT = 1 << 20  # values of a row summed one by one; in as many more, the rounding to bins averages out


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
        self._width = self._odds / max(1, round(self._odds / _WIDTH)) if self._odds > 0 else _WIDTH  # an edge at 0.99
        self.sizes = Histogram(0.0, _BINS * self._width, _BINS)
        self.far, self.far_entropy = 0, 0.0  # values with |u| beyond the bins, and their sum of H(u / 2)
        self.binned: Tensor | None = None  # counts of u, on both sides, of values that were not summed one by one
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
            if not (self._bin(odds) if self.values >= _EXACT else self._add(odds, upper)):
                self.nonfinite = True
                real = odds[~odds.isnan()].clamp(-1e4, 1e4)
                self._add(real, compared(real, 0.0))
            if not bool(self._moves.all()):
                self._range(odds, unit_dims)
        self.on += on.flatten().to("cpu", torch.int64)
        self.per_unit += z.numel() // len(self.rows)

    def _bin(self, odds: Tensor) -> bool:
        """Count values by bins of u, from which the sums over all units follow; as `_add` in what it returns."""
        low, high = (float(end) for end in torch.aminmax(odds)) if odds.numel() else (0.0, 0.0)
        if not max(abs(low), abs(high)) < self.sizes.high:  # beyond the bins, or not finite
            return self._add(odds, compared(odds, 0.0))
        places = torch.mul(in_any_order(odds), 1 / self._width).add_(_BINS).clamp_(0, 2 * _BINS - 1)
        counts = torch.bincount(places.to(torch.int32), minlength=2 * _BINS).cpu()
        self.binned = counts if self.binned is None else self.binned.add_(counts)
        self.sizes.maximum = max(self.sizes.maximum, abs(low), abs(high))
        if low > 0 or high < 0:  # else there is a bin next to 0 that says it, where H is flat
            self.sizes.minimum = min(self.sizes.minimum, max(low, -high))
        self.values += odds.numel()
        if self._hard != self._odds:
            self.hard += int(compared(odds.abs(), self._hard, or_equal=True).sum())
        return True

    def _settle(self) -> None:
        """Turn the counts of bins into sums, each value standing in the middle of its bin."""
        if self.binned is None:
            return
        counts, self.binned = self.binned, None
        middles = (torch.arange(2 * _BINS, dtype=torch.float64) - _BINS + 0.5) * self._width
        weight, size = counts.double(), middles.abs()
        losing = torch.sigmoid(-size)
        self.mean += float(weight @ torch.sigmoid(middles))
        self.losing += float(weight @ losing)
        self.entropy += float(weight @ _entropies(size))
        sizes = counts[_BINS:] + counts[:_BINS].flip(0)
        saturated = int(sizes[round(self._odds / self._width) :].sum())
        self.saturated += saturated
        self.hard += saturated if self._hard == self._odds else 0
        self.sizes.counts += sizes
        self.sizes.count += int(sizes.sum())
        self.sizes.minimum = min(self.sizes.minimum, (int(sizes.nonzero()[0]) + 1) * self._width)

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
        if self.sizes.maximum > self.sizes.high:
            far = size[size > self.sizes.high]
            self.far += far.numel()
            self.far_entropy += float(_entropies(far.double() / 2).sum())
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
        self._settle()
        other._settle()
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
        self.far, self.far_entropy = self.far + other.far, self.far_entropy + other.far_entropy
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
            part._settle()
            whole.values += part.values
            whole.mean, whole.losing = whole.mean + part.mean, whole.losing + part.losing
            whole.entropy += part.entropy
            whole.saturated, whole.hard = whole.saturated + part.saturated, whole.hard + part.hard
            whole.sizes.merge(part.sizes)
            whole.far, whole.far_entropy = whole.far + part.far, whole.far_entropy + part.far_entropy
            whole.nonfinite = whole.nonfinite or part.nonfinite
        return whole

    def responsibility(self) -> Responsibility:
        """Return the statistics of the row; competitions are values."""
        if not self.values:
            return Responsibility(0)
        self._settle()
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
            temperature=self.temperature(),
            mean=self.mean / n,
        )

    def temperature(self) -> Temperature:
        """Return the mean H / ln 2 with the log-odds halved and doubled.

        From the bins of |u|: within one, H(u / 2) and H(2 u) are as good as straight. Beyond the last, H(u / 2) was
        summed as it came, and H(2 u) is below 1e-12.
        """
        counts = self.sizes.counts.double()
        counts[-1] -= self.far
        middles = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * self._width
        half, double = (float((counts * _entropies(middles * scale)).sum()) for scale in (0.5, 2.0))
        whole = self.values * math.log(2)
        return Temperature((half + self.far_entropy) / whole, double / whole)


def _entropies(size: Tensor) -> Tensor:
    """Return H(sigmoid(u)) in nats from |u|, float64."""
    losing = torch.sigmoid(-size)
    return size * losing - torch.log1p(-losing)


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
