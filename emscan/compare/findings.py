"""Findings of two reports: which are new, which are worse than before, which are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from emscan.report.document import Finding, Layer, Report
from emscan.rules.limits import MEASURES, TOTALS, Measure, Reading

Key = tuple[str, int, int]
EVIDENCE = 1.0  # an error of evidence is worse from twice what it was: rounding moves it by less


@dataclass(frozen=True)
class Worse:
    """How a finding is worse: components that it did not name before, or a number and what it was."""

    components: tuple[int, ...] = ()
    what: str = ""
    before: float | None = None
    now: float | None = None


def by_key(report: Report) -> dict[Key, Finding]:
    """Return the findings by their fingerprint, and by which of several alike rows they are about.

    The fingerprint alone numbers findings: where the first of two alike rows loses its own, the second would take its
    place.
    """
    places = _places(report.layers)
    seen: Counter[tuple[str, int]] = Counter()
    found: dict[Key, Finding] = {}
    for finding in report.findings:
        stem = ":".join(finding.fingerprint.split(":")[:3])
        place = places.get(finding.layer_index, -1) if finding.layer_index is not None else -1
        found[stem, place, seen[stem, place]] = finding
        seen[stem, place] += 1
    return found


def _places(layers: list[Layer]) -> dict[int, int]:
    """Return which of the rows with the same fingerprint each index is."""
    seen: Counter[tuple[str, str, str]] = Counter()
    places: dict[int, int] = {}
    for layer in layers:
        alike = (layer.name, layer.composition, layer.mechanism)
        places[layer.index] = seen[alike]
        seen[alike] += 1
    return places


def worse(old: Finding, before: Report, new: Finding, now: Report, tolerance: float) -> Worse | None:
    """Return how a finding is worse than it was, None where it is not.

    ``tolerance``: a number has to move by more than this share of itself, or of what it is measured against (1, K,
    ln K), whichever is larger.
    """
    more = tuple(sorted(set(new.components) - set(old.components)))
    if more:
        return Worse(more)
    for what, number in _NUMBERS.items():
        was, is_ = number(old, before), number(new, now)
        if was is None or is_ is None or was.worth is None or is_.worth is None:
            continue
        slack = (EVIDENCE if what == "evidence" else tolerance) * max(was.whole, abs(was.worth))
        if is_.worth - was.worth > slack:
            return Worse(what=is_.what, before=abs(was.worth), now=abs(is_.worth))
    return None


@dataclass(frozen=True)
class _Number:
    """``worth``: the larger the worse."""

    what: str
    worth: float | None
    whole: float = 0.0


def _measured(finding: Finding, report: Report) -> _Number | None:
    """Return the number that a limit, or the rule that it stands in for, is about."""
    for measure in MEASURES.values():
        if finding.rule != measure.code and (finding.rule not in measure.decides or finding.components):
            continue
        reading = _reading(measure, finding, report)
        if reading is not None:
            whole = 0.0 if measure.counts else reading.whole
            return _Number(measure.what, reading.value if measure.most else -reading.value, whole)
    return None


def _reading(measure: Measure, finding: Finding, report: Report) -> Reading | None:
    if finding.layer_index is not None:
        layer = _layer(finding, report)
        return measure.read(layer) if layer is not None else None
    if measure.name not in TOTALS.values():
        return None
    found = [reading for layer in report.layers if (reading := measure.read(layer)) is not None]
    return Reading(sum(one.value for one in found), sum(one.whole for one in found))


def _evidence(finding: Finding, report: Report) -> _Number | None:
    layer = _layer(finding, report)
    if finding.rule != "EM401" or layer is None or layer.evidence is None:
        return None
    errors = [e for e in (layer.evidence.sum_error, layer.evidence.gradient_error) if e is not None]
    return _Number("error of the responsibilities", max(errors)) if errors else None


def _counted(finding: Finding, report: Report) -> _Number | None:
    """Return the count that a finding about the whole model goes by."""
    if finding.rule == "EM302" and report.weights is not None:
        return _Number("numbers that are not finite", sum(bad.nan + bad.inf for bad in report.weights.not_finite))
    if finding.rule == "EM905" and report.model.partial is not None:
        partial = report.model.partial
        return _Number("tensors that are not from the file", len(partial.missing) + len(partial.mismatched))
    return None


def _layer(finding: Finding, report: Report) -> Layer | None:
    place, rows = finding.layer_index, report.layers
    if place is not None and place < len(rows) and rows[place].index == place:  # as audits number them
        return rows[place]
    return next((layer for layer in report.layers if layer.index == finding.layer_index), None)


_NUMBERS: dict[str, Callable[[Finding, Report], _Number | None]] = {
    "measure": _measured,
    "evidence": _evidence,
    "count": _counted,
}
