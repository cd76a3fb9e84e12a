"""K alternatives: load, entropy, information, who is dead and who starves.

H(r) = -sum_k r_k log r_k; load_k = mean_n r_nk; effective components = exp H(load). The mutual information of input and
component is H(mean r) - mean H(r). All in nats. From scores s: log Z = max s - log max r, H = log Z - sum_k r_k s_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from emscan.measure.chunks import FIRST, SECOND, pieces_of
from emscan.measure.histogram import Histogram
from emscan.measure.moments import Moments
from emscan.measure.temperature import Scaled
from emscan.measure.units import upper_bound
from emscan.report.document import Components, EntropySummary, MaxSummary, Responsibility, Thresholds

MASKED = 5e3  # an energy this far below the best is a mask's, not a score
_HELD = 1 << 16  # entropies held back, since counting a few of them costs as much as counting many
_EXACT = 1 << 20  # responsibilities of a row measured in float64; in as many more, float32 rounding averages out


def visible_alternatives(scores: Tensor, axis: int, far: float = MASKED) -> Tensor | None:
    """Return which alternatives a mask has left: finite scores less than ``far`` below the best. None: all of them."""
    low, high = (float(end) for end in torch.aminmax(scores)) if scores.numel() else (0.0, 0.0)
    if high - low < far:
        return None
    best = scores.amax(axis, keepdim=True)
    return torch.isfinite(scores) & (scores >= best - far)


def entropy(r: Tensor) -> Tensor:
    """Return H over the last axis, in nats; 0 log 0 = 0."""
    return -(r * r.clamp(min=torch.finfo(r.dtype).tiny).log()).sum(-1)


def _dot(below: Tensor, weight: Tensor) -> Tensor:
    """Return sum_k of the products, (n,); ``below`` is overwritten."""
    return below.mul_(weight).sum(-1)


class Alternatives:
    """Streamed statistics of responsibilities over ``count`` alternatives.

    ``persistent``: index k is the same alternative in every competition, so loads make sense. ``books``: sets of K
    alternatives that hold competitions of their own (the codebooks of a product quantizer, the rows of several heads);
    alternative k of book b is component b K + k, and shares of load are shares of all books together.
    """

    def __init__(self, count: int, persistent: bool, thresholds: Thresholds, books: int = 1) -> None:
        self.count, self.persistent, self.books, self._thresholds = count, persistent, books, thresholds
        kept = count * books if persistent else 0
        self.seen = 0  # responsibilities
        self.competitions = 0  # with at least one alternative in sight
        self.measured = 0  # with two or more
        self.hard = 0
        self.mass = torch.zeros(kept, dtype=torch.float64)
        self.used = torch.zeros(kept, dtype=torch.int64)  # responsibilities that are not exactly 0
        self.emitted = 0  # competitions whose own responsibilities were seen, not only their scores
        self.shares = True  # whether all of these summed to one
        self.assignments = torch.zeros(kept, dtype=torch.int64)
        self.picks = 0  # assignments seen
        self.draws = 0  # competitions that they were made in
        self.moments = [Moments(count if persistent else 0, thresholds.collapse_variance) for _ in range(books)]
        self.entropy = Histogram(0.0, math.log(max(2, count)), grows=not persistent)
        self.normalized = 0.0
        self.largest = Histogram(0.0, 1.0)
        self.scaled = Scaled(count)
        self.nonfinite = False

    def update(self, r: Tensor, axis: int = -1, visible: Tensor | None = None, *, book: int = 0) -> None:
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
                part = self._part(book)
                self.used[part] += (size != 0).sum(0).cpu()
                self.emitted += len(size)
                self.shares = self.shares and bool(((total - 1).abs() <= 0.02).all())
            share = size.div_(total)
            if self.persistent:
                self.mass[self._part(book)] += share.sum(0).cpu()
            top = share.amax(-1)
            seen = shown.sum(-1) if shown is not None else None
            self._count(entropy(share), top, seen, r.shape[axis])
            if self.scaled.wants:
                weight = share / top[:, None]
                self.scaled.update(weight, weight.clamp(min=torch.finfo(weight.dtype).tiny).log(), seen)

    def update_scores(
        self, scores: Tensor, axis: int = -1, *, scale: float = 1.0, masks: bool = True, far: float = MASKED,
        book: int = 0,
    ) -> None:  # fmt: skip
        """See scores s with r = softmax(scale * s) along ``axis``; ``masks``: those of -inf are masked, and those
        ``far`` below the best."""
        width, held = scores.shape[axis], _Held()
        for part, _ in self._rows(scores, axis, None):
            rows = part if scale == 1.0 else part * scale
            shown = visible_alternatives(rows, -1, far) if masks else None
            # written into buffers: fresh memory for every piece costs as much as the arithmetic
            below = torch.sub(rows, rows.amax(-1, keepdim=True), out=FIRST.room(rows))
            weight = torch.exp(below, out=SECOND.room(rows))  # exactly 0 so far below the best
            if shown is not None:
                below.masked_fill_(~shown, 0.0)  # 0 times -inf is NaN
            if not masks or far > MASKED:  # 0 times -inf, again
                below.clamp_(min=-MASKED)
            total = weight.sum(-1)
            real = total.isfinite()
            if not bool(real.all()):
                # a row of nothing but -inf is fully masked: no competition, and nothing wrong
                self.nonfinite = self.nonfinite or not bool((rows < math.inf).all())
                below, total, weight, shown = (
                    below[real],
                    total[real],
                    weight[real],
                    shown[real] if shown is not None else None,
                )
            seen = shown.sum(-1) if shown is not None else None
            self.scaled.update(weight, below, seen)
            top = 1 / total
            h = total.log() - _dot(below, weight) * top
            if self.persistent:
                self.mass[self._part(book)] += (top @ weight).cpu()
            held.add(h.clamp_(min=0), top, seen)
            if held.values >= _HELD:
                self._count(*held.all(width), width)
        if held.values:
            self._count(*held.all(width), width)

    def _part(self, book: int) -> slice:
        return slice(book * self.count, (book + 1) * self.count)

    def _rows(self, tensor: Tensor, axis: int, visible: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield rows (n, K) in float32 at least, in float64 at first, and which of them are visible."""
        axis %= tensor.dim()
        both = (tensor,) if visible is None else (tensor, visible.expand(tensor.shape))
        for parts in pieces_of(both, (axis,)):
            rows, *shown = (part.movedim(axis, -1).reshape(-1, tensor.shape[axis]) for part in parts)
            exact = tensor.dtype == torch.float64 or self.seen < _EXACT
            self.seen += rows.numel()
            yield rows.to(torch.float64 if exact else torch.float32), shown[0] if shown else None

    def _count(self, h: Tensor, top: Tensor, seen: Tensor | None, width: int) -> None:
        """Count competitions by entropy and largest share (n,); ``seen``: alternatives in sight, all ``width`` without."""
        self.competitions += len(h)
        if seen is None:
            if width < 2:
                return
            self.normalized += float(h.sum(dtype=torch.float64)) / math.log(width)
        else:
            real = seen >= 2
            h, top, seen = h[real], top[real], seen[real]
            self.normalized += float((h / seen.to(h.dtype).log()).sum(dtype=torch.float64))
        self.measured += len(h)
        self.entropy.update(h)
        self.largest.update(top)
        self.hard += int((top >= self._thresholds.hard).sum())

    def update_assignments(self, chosen: Tensor, *, each: int = 1, book: int = 0) -> None:
        """See the indices that were really picked, of any shape; ``each``: picks in one competition; 0: not told here."""
        flat = chosen.flatten()
        flat = flat[flat >= 0]  # -1 stands for a sample that no alternative took
        counted = torch.bincount(flat, minlength=self.count)[: self.count].cpu()
        self.assignments[self._part(book)] += counted
        self.picks += flat.numel()
        self.draws += chosen.numel() // each if each > 1 else flat.numel() * each

    def update_draws(self, scores: Tensor) -> None:
        """See the scores of K alternatives each in as many competitions as there are, chosen from together."""
        self.draws += scores.numel() // self.count

    def update_kept(self, mask: Tensor, *, book: int = 0) -> None:
        """See which alternatives were kept: bool (..., K)."""
        rows = mask.reshape(-1, self.count)
        self.assignments[self._part(book)] += rows.sum(0).cpu()
        self.picks += int(rows.sum())
        self.draws += len(rows)

    def update_energies(self, scores: Tensor, axis: int = -1, *, book: int = 0) -> None:
        """See the scores themselves, for the variance of each component over the probe."""
        self.moments[book].update(scores, axis)

    def merge(self, other: Alternatives) -> None:
        """Add what another probe shard has shown."""
        for name in ("seen", "competitions", "measured", "hard", "emitted", "picks", "draws", "normalized"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mass += other.mass
        self.used += other.used
        self.shares = self.shares and other.shares
        self.assignments += other.assignments
        for mine, theirs in zip(self.moments, other.moments, strict=True):
            mine.merge(theirs)
        self.entropy.merge(other.entropy)
        self.largest.merge(other.largest)
        self.scaled.merge(other.scaled)
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
        """Mutual information of input and component, from the posterior; its mean over books."""
        soft, mean = self.soft_load, self.entropy.mean
        if soft is None or mean is None:
            return None
        total = float(soft.sum())
        among = float(entropy(soft / total if total > 0 else soft)) - math.log(self.books)
        return max(0.0, among - mean)

    def components(self, kind: str, *, hard: bool, samples: int = 0) -> Components | None:
        """Return the lists of the report; None where alternatives have no identity.

        ``hard``: zeros are by design; ``samples``: how many the probe had, for the bound on what was never seen.
        """
        load = self.load
        if load is None:
            return None
        gone = (self.assignments == 0) if self.picks else (self.used == 0)
        dead = gone if hard and (self.picks or self.emitted) else torch.zeros_like(gone)
        starved = (load < self._thresholds.starved / len(load)) & ~dead
        both = bool(self.picks and self.competitions)
        found = Components(
            kind,
            len(load),
            dead=dead.nonzero().flatten().tolist(),
            starved=starved.nonzero().flatten().tolist(),
            load=load.tolist(),
            soft_load=self.soft_load.tolist() if both and self.soft_load is not None else None,
            mass=self._mass(),
            upper_bound=upper_bound(samples, self._thresholds.confidence) if bool(dead.any()) else None,
        )
        self._correlations(found)
        return found

    def _mass(self) -> list[float | None] | None:
        """N_k: sums of responsibilities; of a choice of one, which is a responsibility of 1, how often it was made."""
        if self.competitions:
            return self.mass.tolist() if self.shares else None
        return self.assignments.double().tolist() if self.picks == self.draws else None

    def on_rate(self) -> list[float | None] | None:
        """Share of competitions in which an alternative is picked, or gets more than exactly 0."""
        if self.draws:
            return (self.assignments.double() * self.books / self.draws).tolist()
        return (self.used.double() * self.books / self.emitted).tolist() if self.emitted else None

    def _correlations(self, found: Components) -> None:
        """Fill in how the scores vary and move together; scores of different books never compete."""
        known = [v for book in self.moments if (v := book.variance) is not None]
        if len(known) == self.books:
            found.variance = torch.cat(known).tolist()
        related = [pair for book in self.moments if (pair := book.pairs.result()) is not None]
        if len(related) < self.books or self.count < 2:
            return
        most = self.books * self.count * (self.count - 1)
        found.correlation_energy = sum(one.energy for one in related)
        found.redundancy = found.correlation_energy / most
        centred = [one.centred for one in related if one.centred is not None]
        found.redundancy_centred = sum(centred) / most if len(centred) == self.books else None
        if any(book.correlated is not None for book in self.moments):
            found.correlated = sum(book.pairs.samples for book in self.moments)
        found.copies = [
            [book * self.count + k for k in group] for book, one in enumerate(related) for group in one.copies
        ]

    def responsibility(self, *, router: bool = False) -> Responsibility:
        """Return the statistics of the row."""
        load = self.load
        h = self.entropy
        found = Responsibility(self.competitions or self.draws)
        if load is not None and float(load.sum()) > 0:
            shares = load / load.sum()
            found.load_entropy = float(entropy(shares))
            found.effective_components = math.exp(found.load_entropy)
            found.max_violation = float(load.max()) * len(load) - 1 if router else None
        if not self.measured:
            return found
        found.entropy = EntropySummary(
            h.mean, h.minimum, h.quantile(0.05), h.quantile(0.5), h.quantile(0.95), h.maximum
        )
        found.normalized_entropy = self.normalized / self.measured
        found.information = self.information()
        found.max = MaxSummary(self.largest.mean, self.largest.quantile(0.95))
        found.hard_fraction = self.hard / self.measured
        found.temperature = self.scaled.summary(self.measured)
        return found


class _Held:
    """Entropies, largest shares and numbers of alternatives in sight, of a few pieces."""

    def __init__(self) -> None:
        self.values = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, h: Tensor, top: Tensor, seen: Tensor | None) -> None:
        """Hold what one piece has shown, (n,) each."""
        self._parts.append((h, top, seen))
        self.values += len(h)

    def all(self, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give up what is held; a piece without a mask shows all ``width`` alternatives."""
        h, top = torch.cat([part[0] for part in self._parts]), torch.cat([part[1] for part in self._parts])
        some = any(seen is not None for _, _, seen in self._parts)
        counts = [torch.full_like(h, width, dtype=torch.int64) if seen is None else seen for h, _, seen in self._parts]
        self._parts, self.values = [], 0
        return h, top, torch.cat(counts) if some else None
