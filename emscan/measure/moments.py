"""Variance and correlation of components over a stream: sums of squares around a typical value lose no digits."""

from __future__ import annotations

import torch
from torch import Tensor

from emscan.measure.chunks import pieces

CORRELATED = (
    128  # up to this many components their correlations are followed; beyond, the products cost more than a layer
)


class Moments:
    """Means, variances and, for up to 128 components, correlations of values (..., K) over all samples."""

    def __init__(self, count: int) -> None:
        self.count, self.samples = count, 0
        self.shift: Tensor | None = None  # (K,) float32, close to the mean
        self.first = torch.zeros(count, dtype=torch.float64)
        shape = (count, count) if count <= CORRELATED else (count,)
        self.square = torch.zeros(shape, dtype=torch.float64)  # products of deviations, or squares alone

    def update(self, values: Tensor, axis: int = -1) -> None:
        """See values with the components along ``axis``; rows that are not finite are left out."""
        axis %= values.dim()
        for part in pieces(values, (axis,)):
            rows = part.movedim(axis, -1).reshape(-1, self.count)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            if not bool(rows.sum().isfinite()):
                rows = rows[rows.isfinite().all(-1)]
            if len(rows):
                self._update(rows)

    def _update(self, rows: Tensor) -> None:
        if self.shift is None:
            self.shift = rows.double().mean(0).float().cpu()
        centred = rows - self.shift.to(rows.device)
        self.first += centred.sum(0).cpu()
        products = centred.T @ centred if self.square.dim() == 2 else centred.square().sum(0)
        self.square += products.cpu()
        self.samples += len(rows)

    def merge(self, other: Moments) -> None:
        """Add what another probe shard has shown."""
        if other.shift is None:
            return
        if self.shift is None:
            self.shift = other.shift.clone()
        move = other.shift.double() - self.shift.double()
        if self.square.dim() == 2:
            cross = torch.outer(move, other.first)
            self.square += other.square + cross + cross.T + other.samples * torch.outer(move, move)
        else:
            self.square += other.square + 2 * move * other.first + other.samples * move.square()
        self.first += other.first + other.samples * move
        self.samples += other.samples

    @property
    def variance(self) -> Tensor | None:
        """Population variance of every component, (K,); None with fewer than two samples."""
        if self.samples < 2:
            return None
        square = self.square.diagonal() if self.square.dim() == 2 else self.square
        return (square / self.samples - (self.first / self.samples).square()).clamp(min=0)

    @property
    def redundancy(self) -> float | None:
        """Mean squared correlation between different components; a constant one correlates with none. Else None."""
        variance = self.variance
        if variance is None or self.square.dim() != 2 or self.count < 2:
            return None
        mean = self.first / self.samples
        covariance = self.square / self.samples - torch.outer(mean, mean)
        scale = torch.outer(variance, variance)
        squared = torch.where(scale > 0, covariance.square() / scale, 0.0).clamp(max=1.0)
        return float(squared.sum() - squared.diagonal().sum()) / (self.count * (self.count - 1))
