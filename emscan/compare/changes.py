"""Two reports -> what changed from one to the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from emscan._version import __version__
from emscan.compare import findings
from emscan.compare.document import (
    Comparison,
    EvidenceChange,
    FindingChange,
    HeadChange,
    LayerChange,
    ListChange,
    LoadShift,
    Number,
    Row,
    Side,
    State,
    Sums,
    VerdictChange,
)
from emscan.compare.rows import matched
from emscan.compare.runs import differences, same_probe
from emscan.report.document import Components, Evidence, Layer, Report

TOLERANCE = 1e-3
LISTS = ("dead", "provably_dead", "starved", "rare", "dormant", "frozen", "linear")
_FLOOR = 1e-6  # numbers that differ by less are equal: shares, entropies and rates in float32 are no better
_LOADS = ("load", "soft_load")
_SPREAD = (
    "normalized_entropy", "effective_components", "information", "max_violation", "hard_fraction", "saturated", "dropped",
    "mean",
)  # fmt: skip
_CHECKS = "EM5"  # findings that only a policy makes


def compare(old: Report, new: Report, *, tolerance: float = TOLERANCE) -> Comparison:
    """Return what changed from one report to another. Nothing in either is changed."""
    pairs, removed, added = matched(old.layers, new.layers)
    changes = [layer_change(was, now, tolerance) for was, now in pairs]
    found = Comparison(
        {"name": "emscan", "version": __version__}, _side(old), _side(new), tolerance, same_probe(old.probe, new.probe),
        _notes(old, new, changes), [change for change in changes if change.changed],
        [_row(layer) for layer in removed], [_row(layer) for layer in added], _findings(old, new, tolerance),
    )  # fmt: skip
    found.summary = _sums(found, len(pairs))
    return found


def _side(report: Report) -> Side:
    s = report.summary
    counts = (s.layers, s.components, s.dead, s.starved, s.findings)
    return Side(report.model, report.probe, s.status, *counts)


def _row(layer: Layer) -> Row:
    parts = layer.components
    count, dead = (parts.count, list(parts.dead)) if parts is not None else (0, [])
    return Row(layer.index, layer.name, layer.composition, layer.verdict, count, dead)


def _notes(old: Report, new: Report, changes: Sequence[LayerChange]) -> list[str]:
    notes = differences(old, new)
    if old.model.sha256 and old.model.sha256 == new.model.sha256:
        notes.append("both are of the same file (equal sha256)")
    if _one_policy(old, new):
        notes.append(f"only one of the two was judged by a policy: findings of {_CHECKS}xx are left out")
    resized = sum(change.old_count != change.count for change in changes)
    if resized:
        rows = "1 row has" if resized == 1 else f"{resized} rows have"
        notes.append(f"{rows} another number of components: their indices are not compared")
    return notes


def layer_change(old: Layer, new: Layer, tolerance: float = TOLERANCE) -> LayerChange:
    """Return what changed in a row; ``changed`` of it tells whether anything did."""
    before, after = old.components, new.components
    change = LayerChange(
        new.index, old.index, new.name, new.composition, old.composition,
        after.kind if after is not None else before.kind if before is not None else None,
        after.count if after is not None else None, before.count if before is not None else None,
    )  # fmt: skip
    if (old.verdict, old.mechanism) != (new.verdict, new.mechanism):
        change.verdict = VerdictChange(old.verdict, new.verdict, old.mechanism, new.mechanism)
    if before is not None or after is not None:
        change.lists = list(_lists(before, after))
    if before is not None and after is not None:
        change.loads = list(_loads(before, after, tolerance))
    change.numbers = list(_numbers(old, new, tolerance))
    lost = change.number("information")
    if lost is not None and lost.old is not None and lost.new is not None and lost.new < lost.old:
        change.information_lost = lost.old - lost.new
    change.heads = list(_heads(old, new, tolerance))
    change.evidence = _evidence(old.evidence, new.evidence)
    return change


def _lists(old: Components | None, new: Components | None) -> Iterator[ListChange]:
    same = old is not None and new is not None and (old.count, old.kind) == (new.count, new.kind)
    for name in LISTS:
        before = set(getattr(old, name)) if old is not None else set()
        after = set(getattr(new, name)) if new is not None else set()
        if same and before != after:
            yield ListChange(name, len(before), len(after), sorted(after - before), sorted(before - after))
        elif not same and (before or after):
            yield ListChange(name, len(before), len(after))


def _loads(old: Components, new: Components, tolerance: float) -> Iterator[LoadShift]:
    """Yield how far the shares of components moved; a list with gaps is not compared."""
    for name in _LOADS:
        before, after = _shares(getattr(old, name)), _shares(getattr(new, name))
        if not before or len(before) != len(after):
            continue
        moves = [abs(b - a) for a, b in zip(before, after, strict=True)]
        distance = math.fsum(moves) / 2
        if distance > max(tolerance, _FLOOR):
            index = moves.index(max(moves))
            yield LoadShift(name, distance, index, before[index], after[index])


def _shares(values: list[float | None] | None) -> list[float]:
    """Return shares that sum to one; the load of latents and units, of which several are on at once, is scaled to it."""
    found = [value for value in values or () if value is not None]
    total = math.fsum(found)
    return [value / total for value in found] if len(found) == len(values or ()) and total > 0 else []


def moved(old: float | None, new: float | None, tolerance: float) -> bool:
    """Whether a number changed by more than the tolerance, a share of the larger of the two."""
    if old is None or new is None:
        return old is not new
    return abs(new - old) > max(tolerance * max(abs(old), abs(new)), _FLOOR)


def _numbers(old: Layer, new: Layer, tolerance: float) -> Iterator[Number]:
    before, after = old.responsibility, new.responsibility
    pairs: list[tuple[str, float | None, float | None]] = [
        (name, getattr(before, name, None), getattr(after, name, None)) for name in _SPREAD
    ]
    pairs.insert(0, (
        "entropy",
        before.entropy.mean if before is not None else None,
        after.entropy.mean if after is not None else None,
    ))  # fmt: skip
    pairs.append(
        ("redundancy", getattr(old.components, "redundancy", None), getattr(new.components, "redundancy", None))
    )
    yield from (Number(name, was, now) for name, was, now in pairs if moved(was, now, tolerance))


def _heads(old: Layer, new: Layer, tolerance: float) -> Iterator[HeadChange]:
    before = (old.responsibility.heads if old.responsibility is not None else None) or []
    after = (new.responsibility.heads if new.responsibility is not None else None) or []
    if len(before) != len(after):
        return
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        if moved(was.normalized_entropy, now.normalized_entropy, tolerance):
            yield HeadChange(index, was.normalized_entropy, now.normalized_entropy)


def _evidence(old: Evidence | None, new: Evidence | None) -> EvidenceChange | None:
    """Return how evidence changed: whether it holds, and whether the posterior is differentiable. Errors within the
    tolerance are rounding and no change."""
    states = _state(old), _state(new)
    apart = getattr(old, "differentiable", None) != getattr(new, "differentiable", None)
    if states[0] == states[1] and not (apart and old is not None and new is not None):
        return None
    return EvidenceChange(*states, old, new)


def _state(evidence: Evidence | None) -> State:
    if evidence is None or evidence.tolerance is None:
        return "unverified"
    errors = [error for error in (evidence.sum_error, evidence.gradient_error) if error is not None]
    if not errors:
        return "unverified"
    return "holds" if max(errors) <= evidence.tolerance else "fails"


def _one_policy(old: Report, new: Report) -> bool:
    return (old.policy is None) != (new.policy is None) and any(
        finding.rule.startswith(_CHECKS) for report in (old, new) for finding in report.findings
    )


def _findings(old: Report, new: Report, tolerance: float) -> list[FindingChange]:
    """Return findings that are new or worse in the order of the new report, then those that are gone."""
    skip = _CHECKS if _one_policy(old, new) else "none"
    before, after = findings.by_key(old), findings.by_key(new)
    changes = []
    for key, finding in after.items():
        was = before.get(key)
        if finding.rule.startswith(skip):
            continue
        if was is None:
            changes.append(FindingChange("new", finding, list(finding.components)))
            continue
        how = findings.worse(was, old, finding, new, tolerance)
        if how is not None:
            number = Number(how.what, how.before, how.now) if how.what else None
            changes.append(FindingChange("worse", finding, list(how.components), number))
    gone = [finding for key, finding in before.items() if key not in after and not finding.rule.startswith(skip)]
    return [*changes, *(FindingChange("fixed", finding, list(finding.components)) for finding in gone)]


def _sums(found: Comparison, rows: int) -> Sums:
    def total(name: str, *, left: bool) -> int:
        return sum(crossed(change.list_change(name), left=left) for change in found.layers)

    kinds = [change.change for change in found.findings if change.finding.suppressed is None]
    return Sums(
        rows, len(found.layers), sum(change.verdict is not None for change in found.layers),
        total("dead", left=False), total("dead", left=True), total("starved", left=False), total("starved", left=True),
        kinds.count("new"), kinds.count("worse"), kinds.count("fixed"),
    )  # fmt: skip


def crossed(change: ListChange | None, *, left: bool) -> int:
    """Return how many components entered a list, or left it; by the counts where indices are not comparable."""
    if change is None:
        return 0
    indices = change.left if left else change.entered
    if indices is not None:
        return len(indices)
    return max(0, change.old - change.new if left else change.new - change.old)
