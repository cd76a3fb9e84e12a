"""Words that several rules and formats use."""

from __future__ import annotations

from collections.abc import Sequence

from emscan.report.document import Report


def listed(indices: Sequence[int], most: int = 5) -> str:
    """Return the first few indices and how many more there are."""
    head = ", ".join(str(index) for index in indices[:most])
    more = len(indices) - most
    return f"{head}, +{more} more" if more > 0 else head


def listed_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and how many more there are."""
    more = len(names) - most
    return f"{', '.join(names[:most])}{f' and {more} more' if more > 0 else ''}"


def noun(kind: str, count: int) -> str:
    """Return the name of a kind of component for a count."""
    return kind[:-1] if count == 1 and kind.endswith("s") and kind != "classes" else kind


def on_probe(report: Report) -> str:
    """Return what a count of dead components is a statement about."""
    if report.probe.synthetic:
        return "on a synthetic probe (indicative only)"
    return f"on this probe of {report.probe.samples:,} samples"


def indicative(report: Report) -> str:
    """Return what a statistic of a synthetic probe has to be read with; nothing where the probe is data."""
    return " (synthetic probe: indicative only)" if report.probe.synthetic else ""
