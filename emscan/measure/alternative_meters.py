"""From sites with K alternatives to accumulators: softmax, kernel, truncation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.alternatives import MASKED, Alternatives
from emscan.measure.books import Books, books_of
from emscan.measure.chunks import pieces
from emscan.measure.masking import can_mask
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps
from emscan.trace.graph import Value
from emscan.trace.operators import SOFTMAX

Result = tuple[Components | None, Responsibility | None, list[str]]
_MOST_VARIANCES = 4096
_PRECISE = 1e-4  # share by which logarithms of weights may differ from multiples of the scores


class AlternativesMeter:
    """Softmax, kernel and truncation rows: responsibilities from the scores, picks from the indices really used."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site = site
        self._router = site.mechanism == "truncation" and site.kind == "experts"
        self._thresholds = thresholds
        self._stats: Alternatives | None = None

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        books = books_of(site, axes, self._stats.books if self._stats is not None else None)
        if self._stats is None:
            self._stats = Alternatives(int(site.count or 2), site.persistent, self._thresholds, books.count)
        stats = self._stats
        if site.numerator is not None:
            return
        if site.terms:
            Together([term.key for term in site.terms], self._together).attach(taps)
            return
        if site.chosen is not None and site.persistent:
            taps.on_value(site.chosen.key, (id(self), "chosen"), lambda i: assigned(stats, site, books, i))
        elif site.winner is not None and site.persistent and site.kind == "latents":
            taps.on_value(site.winner.key, (id(self), "chosen"), lambda m: kept(stats, site, books, m))
        if not site.energies.data:  # a learned vector: the same in every batch
            if site.energies.tensor is not None:
                self._scores(site, books, site.energies.tensor)
            return
        hard = site.mechanism == "truncation"
        if (site.sink and site.statistic != "log-partition") or (hard and site.statistic == "vector"):
            taps.on_value(site.emitted.key, (id(self), "posterior"), lambda r: self._shares(site, books, r))
        elif site.weights is not None:
            in_order(site, taps, site.weights, (id(self), "posterior"), lambda w: self._weights(site, books, w))
        elif hard and site.soft is not None:
            soft = site.soft
            taps.on_value(soft.key, (id(self), "posterior"), lambda r: self._posterior(site, books, soft, r))
        elif not hard or site.kind == "experts":
            in_order(site, taps, site.energies, (id(self), "posterior"), lambda s: self._scores(site, books, s))
        elif _of_batch(site):
            taps.on_value(site.energies.key, (id(self), "draws"), stats.update_draws)
        watch_scores(stats, site, books, taps, (id(self), "variance"))

    def _together(self, scores: Tensor) -> None:
        assert self._stats is not None
        self._stats.update_scores(scores)
        if self._stats.persistent:
            self._stats.update_energies(scores)

    def _scores(self, site: Site, books: Books, scores: Tensor) -> None:
        """Responsibilities from scores in float32 at least, whatever the model's dtype."""
        assert self._stats is not None
        masks = not (site.persistent and site.kind == "classes")
        far = MASKED if masks and can_mask(site) else math.inf
        for book, rows in books.scores(scores, site.axes):
            self._stats.update_scores(rows, scale=site.sign, masks=masks, far=far, book=book)

    def _weights(self, site: Site, books: Books, weights: Tensor) -> None:
        assert self._stats is not None
        for book, part in books.scores(weights, site.weights_axes):
            rows = part.reshape(-1, part.shape[-1])
            for some in rows.split(max(1, (1 << 18) // rows.shape[-1])):
                wide = some.double()
                if site.sink_weight:  # one more alternative, of fixed energy
                    wide = torch.nn.functional.pad(wide, (0, 1), value=site.sink_weight)
                self._stats.update(wide / wide.sum(-1, keepdim=True), -1, wide > 0, book=book)

    def _shares(self, site: Site, books: Books, r: Tensor) -> None:
        """Shares as the model handed them out; what a sink of fixed energy takes is one more alternative."""
        assert self._stats is not None
        for book, part in books.scores(r, site.axes):
            rows = part.double()
            if site.sink:
                rows = torch.cat([rows, (1 - rows.sum(-1, keepdim=True)).clamp(min=0)], -1)
            self._stats.update(rows, -1, book=book)

    def _posterior(self, site: Site, books: Books, soft: Value, r: Tensor) -> None:
        """The posterior before truncation; scores that were not normalized (sigmoids) are brought to sum to one."""
        assert self._stats is not None
        for book, part in books.scores(r, site.axes):
            rows = part.double()
            if soft.call is None or soft.call.op not in SOFTMAX:
                rows = rows / rows.sum(-1, keepdim=True)
            self._stats.update(rows, -1, book=book)

    def finish(self, samples: int) -> Result:
        """Return components and responsibilities of the row."""
        stats = self._stats
        if stats is None or not (stats.competitions or stats.picks):
            return None, None, ["non-finite"] if stats is not None and stats.nonfinite else []
        hard = self._site.mechanism == "truncation"
        components = stats.components(self._site.kind, hard=hard, samples=samples) if stats.persistent else None
        found = stats.responsibility(router=self._router)
        if components is not None and hard and not self._router:
            components.on_rate = stats.on_rate()
        if self._site.kind == "batch":
            found.information = None
        if hard:  # exact zeros stay zeros at any temperature
            found.temperature = None
        return components, found, ["non-finite"] if stats.nonfinite else []


class Together:
    """Alternatives that stand in separate values of one shape: heard one by one, seen together along a new last axis."""

    def __init__(self, keys: list[int], see: Callable[[Tensor], None]) -> None:
        self._see = see
        self._places: dict[int, list[int]] = {}  # a name that is computed several times gives several alternatives
        for place, key in enumerate(keys):
            self._places.setdefault(key, []).append(place)
        self._count = len(keys)
        self._heard: dict[int, Tensor] = {}

    def attach(self, taps: Taps) -> None:
        """Watch every value."""
        for key, places in self._places.items():
            for _ in places:
                taps.on_value(key, (id(self), "term"), functools.partial(self._hear, places))

    def _hear(self, places: list[int], value: Tensor) -> None:
        self._heard[next((place for place in places if place not in self._heard), places[-1])] = value
        if len(self._heard) == self._count:
            values = torch.broadcast_tensors(*(self._heard[at] for at in range(self._count)))
            self._heard = {}
            self._see(torch.stack(values, -1))


def assigned(stats: Alternatives, site: Site, books: Books, chosen: Tensor) -> None:
    """Count the indices that a site has chosen, of every book."""
    if _of_batch(site):  # indices into all samples' latents, sample by sample
        stats.update_assignments(chosen % stats.count, each=0)
        return
    for book, part, each in books.choices(chosen, site.axes[0], len(site.energies.shape), site.kept):
        stats.update_assignments(part, each=each, book=book)


def _of_batch(site: Site) -> bool:
    """Whether the alternatives of all samples of a batch are ranked together."""
    return site.mechanism == "truncation" and site.kind == "latents" and site.energies.shape[site.axes[0]] != site.count


def kept(stats: Alternatives, site: Site, books: Books, mask: Tensor) -> None:
    """Count what a mask of the scores keeps, of every book."""
    for book, rows in books.scores(mask, site.axes):
        stats.update_kept(rows, book=book)


def watch_scores(stats: Alternatives, site: Site, books: Books, taps: Taps, role: object) -> None:
    """Follow how the scores of persistent alternatives vary and move together: log-weights where a kernel gives them."""
    if not site.persistent or not 2 <= stats.count <= _MOST_VARIANCES or len(site.axes) != 1:
        return
    scale = _scale(site)
    logs = scale is None and site.weights is not None
    value, axes = (site.weights, site.weights_axes) if logs and site.weights is not None else (site.energies, site.axes)
    if len(axes) != 1 or not value.data:
        return

    def see(scores: Tensor) -> None:
        for book, rows in books.scores(scores, axes):
            for part in pieces(rows, (rows.dim() - 1,)):
                wide = part if part.dtype == torch.float64 else part.float()
                wide = wide.log() if logs else wide if scale in {None, 1.0} else wide * scale
                if site.sink and wide.shape[-1] == stats.count - 1:  # a sink of fixed energy does not vary
                    wide = torch.nn.functional.pad(wide, (0, 1))
                if _of_batch(site):
                    wide = wide.reshape(-1, stats.count)
                if wide.shape[-1] == stats.count:
                    stats.update_energies(wide, book=book)

    in_order(site, taps, value, role, see)


def in_order(site: Site, taps: Taps, value: Value, role: object, see: Callable[[Tensor], None]) -> None:
    """Listen to scores or weights; those that the model has ranked are brought back into their components' order."""
    if site.order is None:
        taps.on_value(value.key, role, see)
        return
    held: dict[str, Tensor] = {}

    def hear(name: str, heard: Tensor) -> None:
        held[name] = heard
        if len(held) == 2:
            values, order = held.pop("values"), held.pop("order")
            see(
                torch.empty_like(values).scatter(site.axes[0], order, values) if values.shape == order.shape else values
            )

    taps.on_value(site.order.key, (role, "order"), functools.partial(hear, "order"))
    taps.on_value(value.key, role, functools.partial(hear, "values"))


def _scale(site: Site) -> float | None:
    """Return the a with r proportional to exp(a * energies); None where that is not what the weights are.

    For weights written by hand it is read off the numbers: log w, without what all alternatives share, over the
    energies.
    """
    if site.weights is None:
        return site.sign
    weights, energies = site.weights.tensor, site.energies.tensor
    if weights is None or energies is None or weights.shape != energies.shape or len(site.axes) != 1:
        return None
    logs, scores = weights.double().log(), energies.double()
    logs, scores = (t - t.mean(site.axes[0], keepdim=True) for t in (logs, scores))
    known = logs.isfinite() & scores.isfinite()
    logs, scores = logs[known], scores[known]
    size = float(scores.square().sum())
    if size == 0:
        return None
    scale = float((logs * scores).sum()) / size
    apart = float((logs - scale * scores).square().sum())
    near = 1.0 if abs(abs(scale) - 1) < _PRECISE else abs(scale)
    return math.copysign(near, scale) if apart <= _PRECISE * float(logs.square().sum()) else None
