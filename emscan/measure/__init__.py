"""Sites and a stream of batches -> statistics per row, in mergeable accumulators."""

from __future__ import annotations

from emscan.classify.site import Site
from emscan.measure.alternative_meters import AlternativesMeter
from emscan.measure.attention_meters import AttentionMeter, ScoresMeter
from emscan.measure.gate_meters import GateMeter, LogisticMeter
from emscan.measure.router_meters import RouterMeter
from emscan.measure.selection_meters import SelectionMeter
from emscan.report.document import Thresholds

Meter = GateMeter | LogisticMeter | AlternativesMeter | AttentionMeter | ScoresMeter | SelectionMeter | RouterMeter

__all__ = ["Meter", "meter_for"]


def meter_for(site: Site, thresholds: Thresholds) -> Meter:
    """Return the accumulator for a row whose calls look like ``site``."""
    if site.attention is not None:
        return AttentionMeter(site, thresholds)
    if site.mechanism == "logistic":
        return LogisticMeter(site, thresholds)
    if site.mechanism in {"threshold", "smooth-gate"}:
        return GateMeter(site, thresholds)
    if site.mechanism == "truncation" and site.kind == "experts" and (site.choices or site.posterior is not None):
        return RouterMeter(site, thresholds)
    if site.mechanism == "selection":
        return SelectionMeter(site, thresholds)
    written = site.numerator is None and not site.terms and site.segments is None
    written = written and (not site.sink or site.denominator is not None)
    if site.kind == "keys" and site.mechanism != "truncation" and written:
        return ScoresMeter(site, thresholds)
    return AlternativesMeter(site, thresholds)
