"""The findings as the table words them: those of a folded line are one, with their number and the worst case."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from emscan.report.document import Finding, Layer, Level, Report
from emscan.report.fold import Line, groups
from emscan.report.phrases import share_of


@dataclass(frozen=True)
class Notice:
    """One sentence for ``count`` findings of a rule."""

    rule: str
    level: Level
    text: str
    count: int = 1


def notices(report: Report, lines: Sequence[Line], *, chosen: bool = False) -> list[Notice]:
    """Return the findings in their order, those of a folded line as one; ``chosen``: only of rows in ``lines``."""
    line_of = {row.index: line for line in lines for row in line.members}
    unknown = _unknown(report) if any(line.folded for line in lines) else {}
    together: dict[tuple[str, Hashable], list[Finding]] = {}
    for place, finding in enumerate(report.findings):
        line = _line(finding, line_of)
        if chosen and line is None and finding.layer_index is not None:
            continue
        about: Hashable = ("alone", place)
        if line is not None and line.folded:
            about = ("line", line.first.index)
        elif _subject(finding) in unknown:
            about = ("operator", unknown[_subject(finding)])
        together.setdefault((finding.rule, about), []).append(finding)
    return [_notice(found, _line(found[0], line_of), unknown) for found in together.values()]


def _line(finding: Finding, line_of: dict[int, Line]) -> Line | None:
    return line_of.get(finding.layer_index) if finding.layer_index is not None else None


def _subject(finding: Finding) -> str:
    """Return what a finding that belongs to no row is about."""
    return finding.message.rpartition(": ")[0] if finding.layer_index is None else ""


def _notice(found: list[Finding], line: Line | None, unknown: dict[str, str]) -> Notice:
    first = found[0]
    text = first.message
    if len(found) > 1:
        text = _folded(found, line) if line is not None else unknown[_subject(first)]
    return Notice(first.rule, first.level, text, len(found))


def _folded(found: list[Finding], line: Line) -> str:
    """How many rows a rule found something in, how many components in all, and the message about the worst row."""
    rows = {row.index: (tag, row) for row, tag in zip(line.members, line.tags, strict=True)}
    mine = [(f, *rows[f.layer_index]) for f in found if f.layer_index is not None]
    where = f"in {share_of(len({f.layer_index for f in found}), len(rows))}"
    listed = sum(len(f.components) for f in found)
    parts = [row.components for row in line.members if row.components is not None]
    heads = sum(len(row.responsibility.heads or ()) for row in line.members if row.responsibility is not None)
    many = f", {listed} of {sum(p.count for p in parts)} {parts[0].kind}" if listed and parts else ""
    many = f", {listed} of {heads} heads" if listed and heads and not parts else many
    worst, tag, row = max(mine, key=lambda one: _severity(one[0], one[2]))
    ranked = _severity(worst, row) > min(_severity(f, r) for f, _, r in mine)
    body = worst.message.removeprefix(f"layer {row.name}: ")
    return f"layers {line.label}: {where}{many}; {'worst' if ranked else 'e.g.'} {tag}: {body}"


def _errors(layer: Layer) -> float | None:
    proof = layer.evidence
    errors = [e for e in (proof.sum_error, proof.gradient_error) if e is not None] if proof is not None else []
    return max((e if math.isfinite(e) else math.inf for e in errors), default=None)


# What makes one row worse than another where a rule lists no components.
_MEASURES: dict[str, Callable[[Layer], float | None]] = {
    "EM201": lambda row: None if (r := row.responsibility) is None or r.information is None else -r.information,
    "EM202": lambda row: row.responsibility.max_violation if row.responsibility is not None else None,
    "EM203": lambda row: row.responsibility.saturated if row.responsibility is not None else None,
    "EM204": lambda row: row.responsibility.hard_fraction if row.responsibility is not None else None,
    "EM206": lambda row: row.responsibility.dropped if row.responsibility is not None else None,
    "EM401": _errors,
}


def _severity(finding: Finding, row: Layer) -> tuple[float, float]:
    """Return the share of components concerned, then what the rule goes by; larger is worse."""
    count = row.components.count if row.components is not None else 0
    measure = _MEASURES[finding.rule](row) if finding.rule in _MEASURES else None
    return len(finding.components) / max(1, count), -math.inf if measure is None else measure


def _unknown(report: Report) -> dict[str, str]:
    """Return, per unclassified operator and place, the sentence for all places that differ only by index."""
    listed = report.coverage.unclassified
    said: dict[str, str] = {}
    for group in groups([u.where for u in listed], [u.op for u in listed]):
        members = [listed[m] for m in group.members]
        total = sum(u.calls for u in members)
        text = f"{members[0].op} in {group.label}: not classified ({total} calls in {len(members)} places)"
        said |= {f"{u.op} in {u.where}": text for u in members}
    return said
