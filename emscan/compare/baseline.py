"""A baseline: reports that say what is known, so that only what is new or worse counts.

The file is what `--format json` writes: one report, or an array of them. `write_baseline` names the models relative to
the file's folder, so that it means the same wherever the command runs.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emscan.compare import findings
from emscan.compare.runs import differences
from emscan.compare.words import pair, ranges
from emscan.errors import ReportError
from emscan.report.document import Finding, Report
from emscan.report.read import read_reports

TOLERANCE = 0.01  # a number is worse where it moved by more than this share
SUPPRESSED = "baseline"
_UPDATE = "write it with --update-baseline"

Note = Callable[[str], None]


@dataclass
class Known:
    """A report of a baseline, the file that it is from, and the places where its model may lie."""

    report: Report
    file: str
    paths: tuple[Path, ...]
    checked: str | None = None  # the path of the model that met it
    gone: int = 0  # findings that this model has no longer


@dataclass
class Baseline:
    """What reports have seen of models. ``alone``: one model is checked, and there is one report for it to meet.

    ``tolerance``: see ``findings.worse``. ``note`` is told in a sentence what makes a comparison doubtful.
    """

    known: list[Known]
    alone: bool = False
    tolerance: float = TOLERANCE
    note: Note | None = None
    _said: set[str] = field(default_factory=set)
    _worse: list[tuple[Finding, findings.Worse]] = field(default_factory=list)

    def apply(self, report: Report) -> None:
        """Set ``suppressed`` of the findings that are neither new nor worse; what is suppressed already stays so."""
        path = report.model.path or "the model"
        known = self._for(report)
        if known is None:
            self._say(f"{path}: not in the baseline, so every finding is new")
            return
        known.checked = path
        for sentence in differences(known.report, report, "the baseline", path):
            self._say(f"{sentence}; findings may differ for that reason")
        before = findings.by_key(known.report)
        now = findings.by_key(report)
        known.gone = sum(key not in now for key in before)
        for key, finding in now.items():
            old = before.get(key)
            if old is None or finding.suppressed is not None:
                continue
            how = findings.worse(old, known.report, finding, report, self.tolerance)
            if how is None:
                finding.suppressed = SUPPRESSED
            else:
                self._worse.append((finding, how))

    def reason(self, finding: Finding) -> str | None:
        """Return what makes a finding worse than in the baseline, in few words; None for one that is new or known."""
        how = next((how for worse, how in self._worse if worse is finding), None)
        if how is None:
            return None
        if how.components:
            return f"not in the baseline: {ranges(how.components)}"
        return f"{how.what} {pair(how.before, how.now)} since the baseline"

    def stale(self) -> list[str]:
        """Return a sentence for what of the baseline is no longer true: call it when all models are judged."""
        said = []
        for known in self.known:
            if known.checked is None:
                said.append(f"{known.file}: {known.report.model.path or 'a model without a path'} was not checked")
            elif known.gone:
                what = "1 finding is" if known.gone == 1 else f"{known.gone} findings are"
                said.append(f"{known.file}: {what} gone from {known.checked}; --update-baseline takes them out")
        return said

    def _for(self, report: Report) -> Known | None:
        """Return what is known of a model: by its path, else the only report where there is one model."""
        if self.alone:
            return self.known[0]
        if report.model.path is None:
            return None
        place = _real(Path(report.model.path))
        return next((known for known in self.known if place in known.paths), None)

    def _say(self, sentence: str) -> None:
        if self.note is not None and sentence not in self._said:
            self._said.add(sentence)
            self.note(sentence)


def read_baseline(
    paths: str | Path | Sequence[str | Path], models: Sequence[str] = (), *, note: Note | None = None,
    tolerance: float = TOLERANCE,
) -> Baseline:  # fmt: skip
    """Return the baseline in one or several files of reports.

    ``models``: the paths that will be checked. Where there is one of them and one report they meet whatever the report's
    path is: checkpoints of a training run have names of their own. Else the path tells, relative to the file or to the
    working directory. Raises ReportError for a file that holds no reports, or a model twice.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    known = [_known(report, Path(file)) for file in files for report in _read(file, note)]
    taken: dict[Path, Known] = {}
    for one in known:
        if one.paths and one.paths[0] in taken:
            where = f"{taken[one.paths[0]].file} and {one.file}" if taken[one.paths[0]].file != one.file else one.file
            raise ReportError(f"{where}: two reports of {one.report.model.path}", _UPDATE)
        taken |= {one.paths[0]: one} if one.paths else {}
    return Baseline(known, len(known) == 1 and len(models) == 1, tolerance, note)


def _read(file: str | Path, note: Note | None) -> list[Report]:
    if not Path(file).exists():
        raise ReportError(f"no baseline {file}: no such file", _UPDATE)
    return read_reports(file, note)


def _known(report: Report, file: Path) -> Known:
    path = report.model.path
    places = () if path is None else tuple(dict.fromkeys((_real(file.parent / path), _real(Path(path)))))
    return Known(report, str(file), places)


def _real(path: Path) -> Path:
    """Return where a path leads, whether something is there or not; a model's own links keep their name."""
    return path.absolute().parent.resolve() / path.name if path.name not in {"", ".."} else path.resolve()


def baseline_text(reports: Sequence[Report], folder: Path) -> str:
    """Return the JSON text of a baseline that lies in ``folder``: its models are named relative to it."""
    moves = []
    for report in reports:
        moved = copy.copy(report)
        moved.model = copy.copy(report.model)
        if report.model.path is not None:
            moved.model.path = _relative(Path(report.model.path), folder)
        moves.append(moved)
    documents = [report.to_dict() for report in sorted(moves, key=lambda one: one.model.path or "")]
    return json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, allow_nan=False)


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(_real(path), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()
