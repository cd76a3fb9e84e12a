"""The JSON Schemas of a comparison and of a trend, derived from their data classes as that of the report is."""

from __future__ import annotations

from typing import Any

from emscan.compare import document, series
from emscan.report.schema import BOUNDS, Bounds, derived

_SHARE = {"minimum": 0, "maximum": 1}
_NOT_NEGATIVE = {"minimum": 0}
_BOUNDS: Bounds = {
    **BOUNDS,
    ("Comparison", "tool"): {"required": ["name", "version"]},
    ("Trend", "tool"): {"required": ["name", "version"]},
    ("LoadShift", "total_variation"): {"minimum": 0, "maximum": 1.000001},  # rounding of a sum
    **{("LoadShift", name): _SHARE for name in ("old", "new")},
    **{("ListChange", name): _NOT_NEGATIVE for name in ("old", "new", "entered", "left")},
    **{("Side", name): _NOT_NEGATIVE for name in ("layers", "components", "dead", "starved", "findings")},
    **{("Event", name): _NOT_NEGATIVE for name in ("component", "after", "before")},
    **{("LayerSeries", name): _NOT_NEGATIVE for name in ("dead", "rare", "dormant", "starved", "count")},
}


def comparison_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of comparison version 1."""
    return derived(
        document.Comparison, document.SCHEMA_VERSION, _BOUNDS, "emscan comparison",
        "What emscan compare --format json writes. Entropies in nats; null where a number does not apply.",
    )  # fmt: skip


def trend_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of trend version 1."""
    return derived(
        series.Trend, series.SCHEMA_VERSION, _BOUNDS, "emscan trend",
        "What emscan trend --format json writes. Lists over checkpoints have one entry each; null where there is none.",
    )  # fmt: skip
