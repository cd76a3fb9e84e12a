"""From selections to accumulators: who wins how often."""

from __future__ import annotations

from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.alternatives import Alternatives
from emscan.measure.layout import alternatives_last
from emscan.report.document import Components, EntropySummary, MaxSummary, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps

Result = tuple[Components | None, Responsibility | None, list[str]]


class SelectionMeter:
    """One of K wins: who wins how often where alternatives are persistent, how many competitions elsewhere."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site = site
        self._stats = Alternatives(int(site.count or 2), site.persistent, thresholds)
        self._competitions = 0

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        if not site.persistent:
            taps.on_value(site.emitted.key, (id(self), "winners"), self._count)
        elif site.chosen is not None:
            taps.on_value(site.chosen.key, (id(self), "chosen"), self._stats.update_assignments)
        else:
            least = "min" in site.op
            taps.on_value(
                site.energies.key, (id(self), "winners"), lambda s: self._winners(-s if least else s, site.axes)
            )

    def _count(self, winners: Tensor) -> None:
        self._competitions += winners.numel()

    def _winners(self, scores: Tensor, axes: tuple[int, ...]) -> None:
        self._stats.update_assignments(alternatives_last(scores, axes).argmax(-1))

    def finish(self, samples: int) -> Result:
        """Return who won; a selection is a competition of zero entropy."""
        count = self._competitions or self._stats.picks
        if not count:
            return None, None, []
        found = self._stats.responsibility() if self._stats.picks else Responsibility(count)
        found.entropy = EntropySummary(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        found.normalized_entropy, found.hard_fraction, found.max = 0.0, 1.0, MaxSummary(1.0, 1.0)
        components = self._stats.components(self._site.kind, hard=True) if self._stats.picks else None
        return components, found, []
