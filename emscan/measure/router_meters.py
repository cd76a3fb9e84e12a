"""From routers to accumulators: load over all choices, the posterior before truncation, what capacity left out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from emscan.classify.site import Choice, Cut, Posterior, Site
from emscan.measure.alternative_meters import watch_scores
from emscan.measure.alternatives import Alternatives
from emscan.measure.books import Books
from emscan.measure.layout import alternatives_last
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps

Result = tuple[Components | None, Responsibility | None, list[str]]


class RouterMeter:
    """Who is chosen, over all k choices of every token, and the posterior over all K experts beside it.

    Load counts what the router chose, before any capacity leaves assignments out: these are in no list and in no load
    less, but in ``dropped``, their share of all assignments; None where nothing in the run can leave one out.
    """

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site = site
        self._stats = Alternatives(int(site.count or 2), True, thresholds)
        self._limited = False
        self._assigned = self._kept = 0

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        for number, choice in enumerate(site.choices):
            taps.on_value(choice.value.key, (id(self), "choice", number), functools.partial(self._chosen, choice))
        self._limited = self._limited or bool(site.cuts)
        for number, cut in enumerate(site.cuts):
            taps.on_value(cut.before.key, (id(self), "before", number), functools.partial(self._before, cut))
            taps.on_value(cut.after.key, (id(self), "after", number), functools.partial(self._after, cut))
        watch_scores(self._stats, site, Books(), taps, (id(self), "variance"))
        found = site.posterior
        if found is None:
            taps.on_value(site.energies.key, (id(self), "posterior"), lambda s: self._scores(site, s))
        elif found.form == "untold":
            return
        elif found.labels is None:
            taps.on_value(found.value.key, (id(self), "posterior"), functools.partial(self._posterior, found))
        else:
            pair = _Labelled(functools.partial(self._posterior, found), found)
            taps.on_value(found.labels.key, (id(self), "labels"), pair.labels)
            taps.on_value(found.value.key, (id(self), "posterior"), pair.scores)

    def _chosen(self, choice: Choice, chosen: Tensor) -> None:
        if choice.mask:
            picked = ~chosen if choice.inverted else chosen
            chosen = picked.movedim(choice.axis, -1).nonzero()[:, -1]
        elif choice.kept is not None:
            chosen = chosen.narrow(choice.axis, 0, choice.kept)
        self._stats.update_assignments(chosen)

    def _before(self, cut: Cut, value: Tensor) -> None:
        self._assigned += int(value.count_nonzero()) if cut.keeps is None else value.numel()

    def _after(self, cut: Cut, value: Tensor) -> None:
        kept = int(value.count_nonzero())
        self._kept += value.numel() - kept if cut.keeps is False else kept

    def _scores(self, site: Site, scores: Tensor) -> None:
        self._stats.update_scores(alternatives_last(scores, site.axes), scale=site.sign)

    def _posterior(self, found: Posterior, value: Tensor) -> None:
        rows = value.movedim(found.axis, -1)
        if found.form == "softmax":
            self._stats.update_scores(rows)
            return
        rows = rows.double()
        if found.form == "sigmoid":
            rows = torch.sigmoid(rows)
        self._stats.update(rows / rows.sum(-1, keepdim=True), -1)

    def finish(self, samples: int) -> Result:
        """Return components and responsibilities of the row."""
        stats = self._stats
        flags = ["non-finite"] if stats.nonfinite else []
        if not (stats.competitions or stats.picks):
            return None, None, flags
        components = stats.components(self._site.kind, hard=True, samples=samples)
        found = stats.responsibility(router=True)
        found.temperature = None  # exact zeros stay zeros at any temperature
        if self._limited and self._assigned:
            found.dropped = (self._assigned - self._kept) / self._assigned
        return components, found, flags


class _Labelled:
    """Scores whose columns stand for other experts in every row: brought into the experts' own order."""

    def __init__(self, see: functools.partial[None], found: Posterior) -> None:
        self._see, self._axis = see, found.axis
        self._held: dict[str, Tensor] = {}

    def labels(self, value: Tensor) -> None:
        """Hear which expert every score is of."""
        self._hear("labels", value)

    def scores(self, value: Tensor) -> None:
        """Hear the scores."""
        self._hear("scores", value)

    def _hear(self, name: str, value: Tensor) -> None:
        self._held[name] = value
        if len(self._held) == 2:
            scores, labels = self._held["scores"], self._held["labels"]
            self._held = {}
            if scores.shape == labels.shape:
                self._see(torch.empty_like(scores).scatter(self._axis, labels.long(), scores))
