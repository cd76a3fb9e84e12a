"""Variance and correlation of components over a stream: sums of squares around a typical value lose no digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emscan.measure.chunks import FIRST, pieces

CORRELATED = 128  # up to this many components their correlations are over all competitions
_PRODUCTS = 1 << 31  # beyond, products of scores that may be formed, some hundredths of a second; but see `first_of`
_PART = 256  # rows of a K x K matrix looked at together
_BLOCK = 2 * _PART  # and rows formed together; what is left of the diagonal is what is right of it
_ALIKE = 1e-6  # share of the variance of scores below which their differences are rounding
_STILL = 1e-30  # a variance below is that of a constant
_RELATED = 0.1  # share of the mean variance of differences up to which two components move together
_ENOUGH = 30  # competitions: in fewer, scores may move together by chance


def first_of(count: int) -> int | None:
    """Return over how many competitions, the first ones, correlations of K components are taken; None: over all.

    Products cost K^2 per competition. At least 2 K of them, since fewer would correlate by chance.
    """
    return None if count <= CORRELATED else max(2 * count, _PRODUCTS // count**2)


class Moments:
    """Variances of values (..., K) over all competitions, and their correlations over all or the first of them.

    ``apart``: components are copies of each other where their difference varies by less than this.
    """

    def __init__(self, count: int, apart: float = 0.01) -> None:
        self.count, self.samples = count, 0
        self.shift: Tensor | None = None  # (K,) float32, close to the mean
        self.first = torch.zeros(count, dtype=torch.float64)
        self.square = torch.zeros(count, dtype=torch.float64)  # of deviations from the shift
        self.pairs = Pairs(count, apart)

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
        centred = torch.sub(rows, self.shift.to(rows.device), out=FIRST.room(rows))
        first = centred.sum(0).cpu()
        self.first += first
        square = self.pairs.update(centred, first)
        self.square += square if square is not None else centred.square().sum(0).cpu()
        self.samples += len(rows)

    def merge(self, other: Moments) -> None:
        """Add what another probe shard has shown.

        Correlations over the first N are those of both shards where these are N competitions at most, else of the one
        that saw more.
        """
        if other.shift is None:
            return
        if self.shift is None:
            self.shift = other.shift.clone()
        move = other.shift.double() - self.shift.double()
        self.pairs.merge(other.pairs, move)
        self.square += other.square + 2 * move * other.first + other.samples * move.square()
        self.first += other.first + other.samples * move
        self.samples += other.samples

    @property
    def variance(self) -> Tensor | None:
        """Population variance of every component, (K,); None with fewer than two samples."""
        if self.samples < 2:
            return None
        return (self.square / self.samples - (self.first / self.samples).square()).clamp(min=0)

    @property
    def correlated(self) -> int | None:
        """Number of competitions that the correlations are over, where these are not all."""
        return self.pairs.samples if self.pairs.samples < self.samples else None

    @property
    def redundancy(self) -> float | None:
        """Mean squared correlation between different components; a constant one correlates with none. Else None."""
        found = self.pairs.result()
        return found.energy / (self.count * (self.count - 1)) if found is not None else None


@dataclass(frozen=True)
class Related:
    """Sums of squared correlations between different components, and groups of ``copies`` of each other.

    ``centred``: of the scores less their mean in each competition, which takes no part in the responsibilities; None
    where nothing else varies.
    """

    energy: float
    centred: float | None
    copies: list[list[int]]


class Pairs:
    """Products of the deviations of K components; over the first N competitions where K is large.

    Few competitions are held as they are, which takes less room than a matrix; once N is reached, the matrix is reduced
    to what the report needs and given up.
    """

    def __init__(self, count: int, apart: float) -> None:
        self.count, self.limit, self.apart = count, first_of(count), apart
        self.samples = 0
        self.first = torch.zeros(count, dtype=torch.float64)
        self.products: Tensor | None = None  # (K, K): float64; float32 over the first N, where rounding stays small
        self._held: list[Tensor] = []  # deviations of fewer than K / 2 competitions, (n, K)
        self._found: Related | None = None

    def update(self, centred: Tensor, first: Tensor) -> Tensor | None:
        """See deviations (n, K), float32 or float64, with their sums; return the sums of their squares if known."""
        if self.limit is None:
            products = (centred.T @ centred).to("cpu", torch.float64)
            self.products = products if self.products is None else self.products.add_(products)
            self.first += first
            self.samples += len(centred)
            return products.diagonal()
        left = self.limit - self.samples
        if left > 0:
            some = centred[:left]
            self._held.append(some.to(torch.float32, copy=True))
            self.first += first if len(some) == len(centred) else some.sum(0).cpu()
            self.samples += len(some)
            if sum(map(len, self._held)) >= self.count // 2:
                self._fold()
            if self.samples == self.limit:
                self._settle()
        return None

    def _fold(self) -> None:
        """Turn what is held into products."""
        for some in self._held:
            if self.products is None:
                with torch.inference_mode(False):  # an inference tensor could not be added to outside of that mode
                    self.products = torch.zeros(self.count, self.count, dtype=torch.float32, device=some.device)
            for start in range(0, self.count, _BLOCK):
                self.products[start : start + _BLOCK, start:].addmm_(some[:, start : start + _BLOCK].T, some[:, start:])
        self._held = []

    def _settle(self) -> None:
        self._fold()
        self._found = self.result()
        self.products = None

    def merge(self, other: Pairs, move: Tensor) -> None:
        """Add another's products, around a shift that differs by ``move``."""
        self._fold()
        other._fold()
        if other.samples == 0:
            return
        if self.samples == 0:
            self._take(other)
            return
        total = self.samples + other.samples
        mine, theirs = self.products, other.products
        if mine is None or theirs is None or (self.limit is not None and total > self.limit):
            if other.samples > self.samples:
                self._take(other)
            self._settle()
            return
        step = move.to(theirs.device, torch.float64)
        cross = torch.outer(step, other.first.to(theirs.device))
        moved = theirs.double() + cross + cross.T + other.samples * torch.outer(step, step)
        mine.add_(moved)
        self.first += other.first + other.samples * move
        self.samples = total
        if self.samples == self.limit:
            self._settle()

    def _take(self, other: Pairs) -> None:
        self.samples, self.first, self._found = other.samples, other.first.clone(), other._found
        self.products = other.products.clone() if other.products is not None else None

    def result(self) -> Related | None:
        """Return how much the components correlate, and groups of copies of each other.

        Copies: the difference of two scores varies by less than ``apart``, and by less than a tenth of what the
        differences of all pairs vary by on average; the ratio of their responsibilities then hardly varies, and what is
        added to all scores alike takes no part in it. None with fewer than two competitions or components.
        """
        self._fold()
        if self._found is not None or self.products is None or self.samples < 2 or self.count < 2:
            return self._found
        return self._reduced(self.products)

    def _reduced(self, products: Tensor) -> Related:
        """Go through the covariance a few rows at a time."""
        k, n, mean = self.count, self.samples, (self.first / self.samples).to(products.device)
        variance = (products.diagonal().double() / n - mean.square()).clamp(min=0)
        parts = [(start, slice(start, start + _PART)) for start in range(0, k, _PART)]
        right = sum(float(products[part, start:].triu(1).sum(dtype=torch.float64)) for start, part in parts)
        whole = (2 * right + float(products.diagonal().sum(dtype=torch.float64))) / n - float(mean.sum()) ** 2
        shared = self._shared(products, mean, parts)
        own = (variance - 2 * shared + shared.mean()).clamp(min=0)  # variance of a score less what all have in common
        own[own <= _ALIKE * variance] = 0.0
        spread = 2 * (k * float(variance.sum()) - whole) / (k * (k - 1))  # mean of Var(s_i - s_j)
        alike = spread <= _ALIKE * float(variance.mean())  # all of them: that is a collapse, and no copies
        near = min(self.apart, _RELATED * spread) if n >= _ENOUGH and not alike else -1.0
        energy, centred, root = 0.0, 0.0, list(range(k))
        for start, part in parts:
            covariance = products[part, start:].double() / n - torch.outer(mean[part], mean[start:])
            energy += _squared(covariance, variance[part], variance[start:])
            apart = covariance - shared[part, None] - shared[start:] + shared.mean()
            centred += _squared(apart, own[part], own[start:])
            close = (variance[part, None] + variance[start:] - 2 * covariance < near).triu_(1)
            first = close.to(torch.uint8).argmax(0)
            for column in close.any(0).nonzero().flatten().tolist():
                if root[start + column] == start + column:
                    root[start + column] = root[start + int(first[column])]
        groups: dict[int, list[int]] = {}
        for member, leader in enumerate(root):
            groups.setdefault(leader, []).append(member)
        return Related(
            energy, centred if bool((own > 0).any()) else None, [group for group in groups.values() if len(group) > 1]
        )

    def _shared(self, products: Tensor, mean: Tensor, parts: list[tuple[int, slice]]) -> Tensor:
        """Return the covariance of every score with the mean of all scores of its competition, (K,)."""
        sums = products.new_zeros(self.count, dtype=torch.float64)
        for start, part in parts:
            upper = products[part, start:].triu().double()  # left of the diagonal nothing need be formed
            sums[part] += upper.sum(1)
            sums[start:] += upper.sum(0)
        sums -= products.diagonal().double()
        return sums / (self.count * self.samples) - mean * mean.mean()


def _squared(covariance: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Return the sum of squared correlations above the diagonal and below it; ``rows``, ``columns``: variances."""
    scale = torch.outer(rows, columns)
    squared = torch.where(scale > _STILL**2, covariance.square() / scale, 0.0).clamp_(max=1.0)
    return 2 * float(squared.triu_(1).sum())
