"""A comparison for people: plain text, and Markdown for a pull request."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

from emscan.compare import words
from emscan.compare.document import Comparison, FindingChange, Gate, LayerChange, Row
from emscan.compare.gate import condition
from emscan.report.markdown import code, text
from emscan.report.phrases import printable

_ROWS = 20  # of the table without --all
_FINDINGS = 12
_INDICES = 3  # lines that a list of indices may take
_LEAST = 30


def render_text(found: Comparison, width: int = 80, *, everything: bool = False) -> str:
    """Return the comparison in at most ``width`` columns, but for names; ``everything``: nothing is cut."""
    width = max(width, _LEAST)
    lines: list[str] = []
    for label, one in (("old", found.old), ("new", found.new)):
        lines += _wrapped(f"{label}  {words.side(one)}", width, "     ")
    lines += _wrapped(words.probes(found), width, "     ")
    for note in found.notes:
        lines += _wrapped(f"note: {note}", width, "     ")
    shown, left = _chosen(found.layers, everything)
    for change in shown:
        lines += ["", *_wrapped(f"{change.name}  {change.composition}", width, "  ")]
        for sentence in words.sentences(change):
            lines += _cut(_wrapped(f"  {sentence}", width, "    "), everything)
    if left:
        lines += ["", f"... and {left} more row{'s' if left > 1 else ''} changed (--all shows them)"]
    lines += _rows(found.removed, "only in the old report", width, everything)
    lines += _rows(found.added, "only in the new report", width, everything)
    lines += _findings(found.findings, width, everything)
    lines += ["", *_wrapped(words.summary(found), width)]
    lines += [line for one in found.gates for line in _wrapped(_gate(one), width, "       ")]
    return "\n".join(printable(line) for line in lines)


def _chosen(layers: Sequence[LayerChange], everything: bool) -> tuple[list[LayerChange], int]:
    """Return the rows to show, in their order, and how many are left out: those of which only numbers changed go first."""
    if everything or len(layers) <= _ROWS:
        return list(layers), 0
    ranked = sorted(layers, key=lambda change: not words.eventful(change))[:_ROWS]
    kept = {id(change) for change in ranked}
    return [change for change in layers if id(change) in kept], len(layers) - _ROWS


def _rows(rows: Sequence[Row], where: str, width: int, everything: bool) -> Iterator[str]:
    most = len(rows) if everything else _ROWS
    if rows:
        yield ""
    for row in rows[:most]:
        dead = f", {len(row.dead)} of {row.components} dead" if row.components else ""
        yield from _wrapped(f"{row.name}  {row.composition}: {where}{dead}", width, "  ")
    if len(rows) > most:
        yield f"... and {len(rows) - most} more {where} (--all shows them)"


def _findings(changes: Sequence[FindingChange], width: int, everything: bool) -> Iterator[str]:
    counted = [change for change in changes if change.finding.suppressed is None]
    if changes:
        yield ""
    most = len(counted) if everything else _FINDINGS
    for change in counted[:most]:
        finding = change.finding
        components = change.components if change.change == "worse" else ()
        said = words.worse(finding, components, change.number)
        yield from _cut(
            _wrapped(f"{change.change:5} {finding.rule} {finding.level} {said}", width, "      "), everything
        )
    if len(counted) > most:
        yield f"... and {len(counted) - most} more (--all shows them)"
    if len(counted) < len(changes):
        rest = len(changes) - len(counted)
        yield f"{rest} suppressed finding{'s' if rest > 1 else ''} changed; {'they do' if rest > 1 else 'it does'} not count"


def _gate(one: Gate) -> str:
    kind = condition(one.kind).kind
    return words.gate(one, kind.what, kind.unit)


def _cut(lines: list[str], everything: bool) -> list[str]:
    """Return a few lines of a long list."""
    if everything or len(lines) <= _INDICES:
        return lines
    return [*lines[: _INDICES - 1], f"{lines[_INDICES - 1]} ... (--all)"]


def _wrapped(line: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]  # fmt: skip


def render_markdown(found: Comparison, *, everything: bool = False) -> str:
    """Return the comparison as Markdown; nothing in a name becomes markup."""
    old, new = found.old.model.path or "model", found.new.model.path or "model"
    lines = [f"### emscan: {code(old)} -> {code(new)}", "", text(words.summary(found)), "", text(words.probes(found))]
    lines += [part for note in found.notes for part in ("", f"**Note:** {text(note)}")]
    shown, left = _chosen(found.layers, everything)
    if shown:
        lines += ["", "| Layer | Composition | Change |", "| --- | --- | --- |"]
    for change in shown:
        said = "<br>".join(text(sentence) for sentence in words.sentences(change))
        lines.append(f"| {code(change.name)} | {text(change.composition)} | {said} |")
    if left:
        lines += ["", f"and {left} more rows changed"]
    for rows, where in ((found.removed, "only in the old report"), (found.added, "only in the new report")):
        if rows:
            lines += [
                "",
                *_listed([f"- {code(row.name)} {text(row.composition)}: {where}" for row in rows], everything),
            ]
    counted = [change for change in found.findings if change.finding.suppressed is None]
    if counted:
        lines += ["", *_listed([_finding(change) for change in counted], everything)]
    if found.gates:
        lines += ["", *(f"- {text(_gate(one))}" for one in found.gates)]
    return "\n".join(lines)


def _listed(lines: list[str], everything: bool) -> list[str]:
    if everything or len(lines) <= _ROWS:
        return lines
    return [*lines[:_ROWS], f"- and {len(lines) - _ROWS} more"]


def _finding(change: FindingChange) -> str:
    finding = change.finding
    components = change.components if change.change == "worse" else ()
    said = text(words.worse(finding, components, change.number))
    return f"- {change.change}: **{finding.rule} {finding.level}** {said}"


RENDERERS: dict[str, Callable[..., str]] = {"table": render_text, "markdown": render_markdown}
