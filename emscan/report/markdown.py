"""Markdown to paste into a pull request, and for job summaries. Nothing in a name becomes markup, link or mention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from emscan.report import phrases
from emscan.report.base import Format, Setting
from emscan.report.document import Finding, Report
from emscan.report.fold import Line
from emscan.report.notices import Notice, notices
from emscan.report.places import clipped, named
from emscan.report.select import view

SUMMARY_BYTES = 1 << 20  # of all job summaries of a step together
_HEAD = ("Layer", "Name", "EM structure", "Mechanism", "K", "Dead", "Spread", "Look first")
_LISTED = 50  # findings of a report
_NAME = 200
_TEXT = 1_000


class MarkdownFormat(Format):
    """A heading, the table folded as in a terminal, the findings that count, how many are suppressed, how far it goes."""

    name = "markdown"
    tables = True

    def render(
        self,
        report: Report,
        *,
        width: int = 100,
        all_layers: bool = False,
        layers: Sequence[str] = (),
        setting: Setting | None = None,
    ) -> str:
        """Return the Markdown of one report."""
        return "\n".join(_lines(report, all_layers, layers))

    def render_many(
        self,
        reports: Sequence[Report],
        *,
        width: int = 100,
        all_layers: bool = False,
        layers: Sequence[str] = (),
        setting: Setting | None = None,
    ) -> str:
        """Return an overview where there are several, then each, and what could not be audited."""
        unaudited = setting.unaudited if setting is not None else ()
        parts = [_overview(reports)] if len(reports) > 1 else []
        parts += [self.render(report, all_layers=all_layers, layers=layers) for report in reports]
        if unaudited:
            said = [
                f"- {code(one.path)}: {'skipped' if one.skipped else 'failed'}: {text(one.why)}" for one in unaudited
            ]
            parts.append("\n".join(["### Not audited", "", *said]))
        return "\n\n".join(parts)


def code(name: str, most: int = _NAME) -> str:
    """Return a name as a code span, which holds anything; a pipe would end the cell of a table."""
    name = clipped(name, most)
    if not name.strip():
        return "-"
    fence = "`" * (max(map(len, re.findall("`+", name)), default=0) + 1)
    pad = " " if name.startswith("`") or name.endswith("`") or (name[0] == name[-1] == " ") else ""
    return f"{fence}{pad}{name}{pad}{fence}".replace("|", "\\|")


def text(said: str) -> str:
    """Return prose in which nothing is markup, a link, a mention or a reference to an issue."""
    said = re.sub(r"([\\`*_{}\[\]<>|~&$])", r"\\\1", clipped(said, _TEXT))
    return re.sub(r"(?<=[@#!])(?=\w)|(?<=[A-Za-z]:)(?=//)|(?<=www)(?=\.)", "<!-- -->", said, flags=re.IGNORECASE)


def message(said: str, subjects: Sequence[str]) -> str:
    """Return a finding's message, which begins with one of ``subjects`` ("layer fc") and a colon: that is a code span."""
    about = max((one for one in subjects if said.startswith(f"{one}:")), key=len, default="")
    if not about:
        return text(said)
    word, _, name = about.partition(" ")
    return f"{word} {code(name)}{text(said[len(about) :])}"


def summary(markdown: str, room: int = SUMMARY_BYTES) -> str:
    """Return Markdown of at most ``room`` bytes, cut after a line, which a last line then says."""
    data = markdown.encode("utf-8", "replace")
    if len(data) <= room:
        return data.decode()
    note = "\n\n(cut: a job summary holds 1 MiB)\n"
    kept = data[: max(0, room - len(note))].decode("utf-8", "ignore").rpartition("\n")[0]
    return f"{kept}{note}" if kept else ""


def _overview(reports: Sequence[Report]) -> str:
    head = ("Model", "Layers", "EM", "Dead", "Errors", "Warnings", "Suppressed", "Status")
    lines = [_row(head), _row("---" for _ in head)]
    for report in reports:
        counts = Counter(f.level for f in report.findings if f.suppressed is None)
        held = sum(f.suppressed is not None for f in report.findings)
        s = report.summary
        cells = (s.layers, s.em, f"{s.dead}/{s.components}", counts["error"], counts["warning"], held, s.status)
        lines.append(_row((code(named(report)), *map(str, cells))))
    return "\n".join(lines)


def _lines(report: Report, all_layers: bool, layers: Sequence[str]) -> list[str]:
    model = report.model
    out = [f"### emscan: {code(named(report))}", "", text(f"{model.format}, {model.parameters:,} parameters")]
    said = phrases.notice(report)
    if said:
        out += ["", f"**{text(said)}**"]
    lines = view(report, all_layers=all_layers, layers=layers)
    found: dict[int, list[Finding]] = {}
    for finding in report.findings:
        if finding.layer_index is not None and finding.suppressed is None:
            found.setdefault(finding.layer_index, []).append(finding)
    if lines:
        out += ["", _row(_HEAD), _row(("---", "---", "---", "---", "--:", "--:", "---", "---"))]
    for line in lines:
        row = line.first
        seen = [f for member in line.members for f in found.get(member.index, ())]
        calls = phrases.calls(line)
        cells = (
            phrases.structure(row),
            phrases.mechanism(row),
            phrases.count(row),
            phrases.dead(line),
            phrases.spread(line),
        )
        look = text(phrases.look_first(line, seen))
        out.append(_row((text(row.composition), f"{code(line.label)}{text(calls)}", *map(text, cells), look)))
    left = phrases.left_out(report, lines, all_layers=all_layers, chosen=bool(layers))
    out += [part for one in left for part in ("", text(one))]
    counted = replace(report, findings=[f for f in report.findings if f.suppressed is None])
    out += _findings(report, lines, notices(counted, lines, chosen=bool(layers)))
    out += [part for one in phrases.closing(report) for part in ("", text(one))]
    return out


def _findings(report: Report, lines: Sequence[Line], found: Sequence[Notice]) -> list[str]:
    names = [f"layer {name}" for name in dict.fromkeys(layer.name for layer in report.layers)]
    names += [f"layers {line.label}" for line in lines if line.folded]
    out = (
        ["", *(f"- **{one.rule} {one.level}** {message(one.text, names)}" for one in found[:_LISTED])] if found else []
    )
    more = sum(one.count for one in found[_LISTED:])
    if more:
        out.append(f"- and {more:,} more findings")
    held = Counter(f.suppressed.split(":")[0] for f in report.findings if f.suppressed is not None)
    if held:
        kinds = ", ".join(f"{count:,} by {text(kind)}" for kind, count in sorted(held.items()))
        out += ["", f"Suppressed findings, which do not count: {kinds}."]
    return out


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
