"""A fixed histogram that streams and merges: quantiles right to one bin, extremes exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emscan.measure.chunks import in_any_order

BINS = 4096
_PIECE = 1 << 18  # values binned at a time, so that scratch stays in cache


class Histogram:
    """Counts of values on [low, high] in equal bins, with sum, minimum and maximum kept exactly (float64).

    NaN and infinities are left out of everything but ``nonfinite``, their number. ``grows``: the range is not known
    beforehand, and bins of the same width are added above where values need them.
    """

    def __init__(self, low: float, high: float, bins: int = BINS, *, grows: bool = False) -> None:
        self.low, self.high, self.grows = low, max(high, low + 1e-12), grows
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.total, self.count, self.nonfinite = 0.0, 0, 0
        self.minimum, self.maximum = math.inf, -math.inf

    def update(self, values: Tensor) -> None:
        """Count ``values`` (any shape); those outside the range by rounding fall into the outermost bins."""
        flat = in_any_order(values.detach())
        for start in range(0, flat.numel(), _PIECE):
            part = flat[start : start + _PIECE]
            self._update(part if part.dtype in {torch.float32, torch.float64} else part.float())

    def _update(self, values: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = values[values.isfinite()]
            self.nonfinite += values.numel() - finite.numel()
            if finite.numel():
                self._update(finite)
            return
        total = float(values.sum())
        self.total += total if math.isfinite(total) else float(values.sum(dtype=torch.float64))
        self.count += values.numel()
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if self.grows and high > self.high:
            self._reach(high)
        bins = len(self.counts)
        places = torch.sub(values, self.low).mul_(bins / (self.high - self.low)).clamp_(0, bins - 1)
        # bincount of int32 is ten times faster than histc, and exact for any number of values
        self.counts += torch.bincount(places.to(torch.int32), minlength=bins).cpu()

    def _reach(self, high: float) -> None:
        """Add bins of the same width up to ``high``."""
        width = (self.high - self.low) / len(self.counts)
        more = math.ceil((high - self.high) / width)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        self.high += more * width

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram: of the same bins, or of any where this one grows."""
        if self.grows and (self.high, len(self.counts)) != (other.high, len(other.counts)):
            if other.high > self.high:
                self._reach(other.high)
            bins = len(other.counts)
            middles = (torch.arange(bins, dtype=torch.float64) + 0.5) * ((other.high - other.low) / bins)
            places = (middles * (len(self.counts) / (self.high - self.low))).long().clamp(max=len(self.counts) - 1)
            self.counts.index_add_(0, places, other.counts)
        else:
            self.counts += other.counts
        self.total, self.count = self.total + other.total, self.count + other.count
        self.nonfinite += other.nonfinite
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    @property
    def mean(self) -> float | None:
        """Mean of all values; None without values."""
        return self.total / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """Return the q-quantile, right to one bin; None without values."""
        if not self.count:
            return None
        rank = q * (self.count - 1)
        index = int(torch.searchsorted(self.counts.cumsum(0), math.floor(rank) + 1))
        width = (self.high - self.low) / len(self.counts)
        middle = self.low + (min(index, len(self.counts) - 1) + 0.5) * width
        return min(max(middle, self.minimum), self.maximum)
