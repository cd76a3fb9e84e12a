"""GitHub Actions: annotations, which the runner reads from a step's log, and the job summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emscan.report.base import Document, Setting
from emscan.report.document import Level, Report
from emscan.report.places import Place, clipped, layers_by_index, named, path_place, place, sentence

MOST = 10  # annotations of a level that the runner shows of a step
_COMMAND: dict[Level, str] = {"error": "error", "warning": "warning", "note": "notice"}
_TEXT = 2_000


@dataclass(frozen=True)
class _Note:
    """One annotation."""

    level: Level
    title: str
    text: str
    where: Place | None


class GithubFormat(Document):
    """Errors, warnings and notes that count; what is suppressed is left out, and what is more than GitHub shows."""

    name = "github"

    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return one workflow command a line; where there are too many of a level, its last one says how many more."""
        notes = list(_notes(reports, setting))
        total = Counter(note.level for note in notes)
        shown: Counter[Level] = Counter()
        lines = []
        for note in notes:
            shown[note.level] += 1
            if shown[note.level] < MOST or total[note.level] <= MOST:
                lines.append(_command(note))
            elif shown[note.level] == MOST:
                more = total[note.level] - MOST + 1
                text = f"{more:,} more {note.level}s: GitHub shows {MOST} of a step; the report and the job summary have all"
                lines.append(_command(_Note(note.level, "emscan", text, None)))
        return "\n".join(lines)


def _notes(reports: Sequence[Report], setting: Setting) -> Iterator[_Note]:
    for one in setting.unaudited:
        if not one.skipped:
            yield _Note("error", "emscan: not audited", f"{one.path}: {one.why}", path_place(one.path, setting))
    for report in reports:
        rows = layers_by_index(report)
        for finding in report.findings:
            if finding.suppressed is not None:
                continue
            row = rows.get(finding.layer_index) if finding.layer_index is not None else None
            page = setting.rules.get(finding.rule)
            title = f"{finding.rule} {page.name}" if page is not None else finding.rule
            text = f"{named(report)}: {sentence(finding)}"
            yield _Note(finding.level, title, text, place(row, report, setting))


def _command(note: _Note) -> str:
    """Return the workflow command of an annotation. A file outside the repository is none of the runner's."""
    properties = {"title": note.title}
    if note.where is not None and note.where.inside:
        properties = {"file": note.where.path, **properties}
        if note.where.line is not None:
            properties["line"] = str(note.where.line)
    listed = ",".join(f"{name}={_property(clipped(value, _TEXT))}" for name, value in properties.items())
    return f"::{_COMMAND[note.level]} {listed}::{_data(clipped(note.text, _TEXT))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
