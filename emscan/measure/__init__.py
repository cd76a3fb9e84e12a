"""Sites and a stream of batches -> statistics per row, in mergeable accumulators."""

from __future__ import annotations

from emscan.classify.site import Site
from emscan.measure.alternative_meters import AlternativesMeter
from emscan.measure.attention_meters import AttentionMeter, ScoresMeter
from emscan.measure.gate_meters import GateMeter, LogisticMeter
from emscan.measure.selection_meters import SelectionMeter
from emscan.report.document import Thresholds

Meter = GateMeter | LogisticMeter | AlternativesMeter | AttentionMeter | ScoresMeter | SelectionMeter

__all__ = ["Meter", "meter_for"]


def meter_for(site: Site, thresholds: Thresholds) -> Meter:
    """Return the accumulator for a row whose calls look like ``site``."""
    if site.attention is not None:
        return AttentionMeter(site, thresholds)
    if site.mechanism == "logistic":
        return LogisticMeter(site, thresholds)
    if site.mechanism in {"threshold", "smooth-gate"}:
        return GateMeter(site, thresholds)
    if site.mechanism == "selection":
        return SelectionMeter(site, thresholds)
    written = site.numerator is None and not site.terms and site.segments is None and not site.sink
    if site.kind == "keys" and site.mechanism != "truncation" and written and site.energies.data:
        return ScoresMeter(site, thresholds)
    return AlternativesMeter(site, thresholds)
