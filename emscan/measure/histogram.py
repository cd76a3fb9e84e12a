"""A fixed histogram that streams and merges: quantiles right to one bin, extremes exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 4096


class Histogram:
    """Counts of values on [low, high] in equal bins, with sum, minimum and maximum kept exactly (float64)."""

    def __init__(self, low: float, high: float, bins: int = BINS) -> None:
        self.low, self.high = low, max(high, low + 1e-12)
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.total, self.count = 0.0, 0
        self.minimum, self.maximum = math.inf, -math.inf

    def update(self, values: Tensor) -> None:
        """Count ``values`` (any shape); those outside the range by rounding fall into the outermost bins."""
        if not values.numel():
            return
        values = values.detach().flatten()
        values = values if values.dtype in {torch.float32, torch.float64} else values.float()
        self.total += float(values.sum(dtype=torch.float64))
        self.count += values.numel()
        low, high = torch.aminmax(values)
        self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
        inside = values.clamp(self.low, self.high)
        # histc counts in the dtype of its input: exact in float32 up to 2^24 a call
        for part in inside.split(1 << 23):
            binned = torch.histc(part, len(self.counts), self.low, self.high)
            self.counts += binned.to("cpu", torch.int64)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram of the same range."""
        self.counts += other.counts
        self.total, self.count = self.total + other.total, self.count + other.count
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
