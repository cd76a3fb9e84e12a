"""From selections to accumulators: who wins how often."""

from __future__ import annotations

from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.alternative_meters import assigned, watch_scores
from emscan.measure.alternatives import Alternatives
from emscan.measure.books import Books, books_of
from emscan.report.document import Components, EntropySummary, MaxSummary, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps

Result = tuple[Components | None, Responsibility | None, list[str]]


class SelectionMeter:
    """One of K wins: who wins how often where alternatives are persistent, how many competitions elsewhere."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site, self._thresholds = site, thresholds
        self._stats: Alternatives | None = None
        self._competitions = 0

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        if not site.persistent:
            taps.on_value(site.emitted.key, (id(self), "winners"), self._count)
            return
        books = books_of(site, axes, self._stats.books if self._stats is not None else None)
        if self._stats is None:
            self._stats = Alternatives(int(site.count or 2), True, self._thresholds, books.count)
        stats = self._stats
        if site.chosen is not None:
            taps.on_value(site.chosen.key, (id(self), "chosen"), lambda i: assigned(stats, site, books, i))
        else:
            taps.on_value(site.energies.key, (id(self), "winners"), lambda s: _winners(stats, site, books, s))
        watch_scores(stats, site, books, taps, (id(self), "variance"))

    def _count(self, winners: Tensor) -> None:
        self._competitions += winners.numel()

    def finish(self, samples: int) -> Result:
        """Return who won; a selection is a competition of zero entropy."""
        stats = self._stats
        picked = stats is not None and stats.picks > 0
        if not (self._competitions or picked):
            return None, None, []
        found = stats.responsibility() if stats is not None and picked else Responsibility(self._competitions)
        found.entropy = EntropySummary(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        found.normalized_entropy, found.hard_fraction, found.max = 0.0, 1.0, MaxSummary(1.0, 1.0)
        components = None
        if stats is not None and picked:
            components = stats.components(self._site.kind, hard=True, samples=samples)
            if components is not None:
                components.copies = None  # distances have no scale that says when two of them are the same
        return components, found, []


def _winners(stats: Alternatives, site: Site, books: Books, scores: Tensor) -> None:
    """Count who wins where the model hands out the extreme itself, not its index."""
    for book, rows in books.scores(scores, site.axes):
        stats.update_assignments(rows.argmin(-1) if "min" in site.op else rows.argmax(-1), book=book)
