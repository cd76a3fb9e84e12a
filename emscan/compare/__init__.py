"""What changed between reports: against a baseline, between two, over a training run. No torch here."""

from __future__ import annotations

from emscan.compare.baseline import Baseline, baseline_text, read_baseline
from emscan.compare.changes import compare
from emscan.compare.document import Comparison
from emscan.compare.series import Trend, trend

__all__ = ["Baseline", "Comparison", "Trend", "baseline_text", "compare", "read_baseline", "trend"]
