"""From sites with K alternatives to accumulators: softmax, kernel, truncation."""

from __future__ import annotations

import torch
from torch import Tensor

from emscan.classify.site import Site
from emscan.measure.alternatives import Alternatives
from emscan.measure.layout import alternatives_last
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps
from emscan.trace.graph import Value
from emscan.trace.operators import SOFTMAX

Result = tuple[Components | None, Responsibility | None, list[str]]
_MOST_VARIANCES = 4096


class AlternativesMeter:
    """Softmax, kernel and truncation rows: responsibilities from the scores, picks from the indices really used."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site = site
        self._router = site.mechanism == "truncation" and site.kind == "experts"
        self._stats = Alternatives(int(site.count or 2), site.persistent, thresholds)

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        if site.terms or site.numerator is not None:
            return
        if site.chosen is not None and site.persistent:
            taps.on_value(site.chosen.key, (id(self), "chosen"), self._stats.update_assignments)
        if not site.energies.data:  # a learned vector: the same in every batch
            if site.energies.tensor is not None:
                self._scores(site, site.energies.tensor)
            return
        hard = site.mechanism == "truncation"
        if (site.sink and site.statistic != "log-partition") or (hard and site.statistic == "vector"):
            taps.on_value(site.emitted.key, (id(self), "posterior"), lambda r: self._shares(site, r))
        elif site.weights is not None:
            taps.on_value(site.weights.key, (id(self), "posterior"), lambda w: self._weights(site, w))
        elif hard and site.soft is not None:
            soft = site.soft
            taps.on_value(soft.key, (id(self), "posterior"), lambda r: self._posterior(site, soft, r))
        elif not hard or site.kind == "experts":
            taps.on_value(site.energies.key, (id(self), "posterior"), lambda s: self._scores(site, s))
        wanted = (
            site.persistent
            and int(site.count or 0) <= _MOST_VARIANCES
            and site.weights is None
            and not hard
            and not site.sink
        )
        if wanted and len(site.axes) == 1:
            taps.on_value(
                site.energies.key, (id(self), "variance"), lambda s: self._stats.update_energies(s, site.axes[0])
            )

    def _scores(self, site: Site, scores: Tensor) -> None:
        """Responsibilities from scores in float32 at least, whatever the model's dtype."""
        rows = alternatives_last(scores, site.axes)
        masks = not (site.persistent and site.kind == "classes")
        self._stats.update_scores(rows, scale=site.sign, masks=masks)

    def _weights(self, site: Site, weights: Tensor) -> None:
        rows = alternatives_last(weights, site.weights_axes)
        rows = rows.reshape(-1, rows.shape[-1])
        for part in rows.split(max(1, (1 << 18) // rows.shape[-1])):
            wide = part.double()
            if site.sink_weight:  # one more alternative, of fixed energy
                wide = torch.nn.functional.pad(wide, (0, 1), value=site.sink_weight)
            self._stats.update(wide / wide.sum(-1, keepdim=True), -1, wide > 0)

    def _shares(self, site: Site, r: Tensor) -> None:
        """Shares as the model handed them out; what a sink of fixed energy takes is one more alternative."""
        rows = alternatives_last(r, site.axes).double()
        if site.sink:
            rows = torch.cat([rows, (1 - rows.sum(-1, keepdim=True)).clamp(min=0)], -1)
        self._stats.update(rows, -1)

    def _posterior(self, site: Site, soft: Value, r: Tensor) -> None:
        """The posterior before truncation; scores that were not normalized (sigmoids) are brought to sum to one."""
        rows = alternatives_last(r, site.axes).double()
        if soft.call is None or soft.call.op not in SOFTMAX:
            rows = rows / rows.sum(-1, keepdim=True)
        self._stats.update(rows, -1)

    def finish(self, samples: int) -> Result:
        """Return components and responsibilities of the row."""
        stats = self._stats
        if not (stats.competitions or stats.picks):
            return None, None, ["non-finite"] if stats.nonfinite else []
        hard = self._site.mechanism == "truncation"
        components = stats.components(self._site.kind, hard=hard) if stats.persistent else None
        found = stats.responsibility(router=self._router)
        if self._site.kind == "batch":
            found.information = None
        return components, found, ["non-finite"] if stats.nonfinite else []
