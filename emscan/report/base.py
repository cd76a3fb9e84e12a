"""What every output format has in common: the abstract base, and what a report is written for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emscan.report.document import Level, Report


@dataclass(frozen=True)
class Page:
    """A rule as formats explain it; ``text`` is what `emscan rule CODE` prints."""

    code: str
    name: str
    level: Level
    text: str


@dataclass(frozen=True)
class Unaudited:
    """A model that there is no report of: the audit failed, or a policy left it out (``skipped``)."""

    path: str
    why: str
    skipped: bool = False


@dataclass(frozen=True)
class Setting:
    """What a format needs besides the reports.

    ``folder``: relative paths of models start there. ``root``: files below it are named relative to it, as code hosts
    want it (None: ``folder``). ``rules``: by code. ``exit_status``: of the process that writes, None if it is not known.
    """

    folder: Path = Path()
    root: Path | None = None
    rules: Mapping[str, Page] = field(default_factory=dict)
    exit_status: int | None = None
    unaudited: Sequence[Unaudited] = ()


class Format(ABC):
    """Turns reports into text, without the end of the last line."""

    name: str
    tables: bool = False  # whether width, all_layers and layers have a meaning
    end: str = "\n"

    @abstractmethod
    def render(
        self,
        report: Report,
        *,
        width: int = 100,
        all_layers: bool = False,
        layers: Sequence[str] = (),
        setting: Setting | None = None,
    ) -> str:
        """Return the report as text; ``width`` in columns, ``all_layers`` and the globs ``layers`` concern tables only."""

    def render_many(
        self,
        reports: Sequence[Report],
        *,
        width: int = 100,
        all_layers: bool = False,
        layers: Sequence[str] = (),
        setting: Setting | None = None,
    ) -> str:
        """Return several reports as one text: one after the other, a blank line apart."""
        parts = [
            self.render(report, width=width, all_layers=all_layers, layers=layers, setting=setting)
            for report in reports
        ]
        return "\n\n".join(parts)


class Document(Format):
    """A format whose text is one document over all reports, whatever the width of a terminal."""

    def render(
        self,
        report: Report,
        *,
        width: int = 100,
        all_layers: bool = False,
        layers: Sequence[str] = (),
        setting: Setting | None = None,
    ) -> str:
        """Return the document of one report."""
        return self.document([report], setting or Setting())

    def render_many(
        self,
        reports: Sequence[Report],
        *,
        width: int = 100,
        all_layers: bool = False,
        layers: Sequence[str] = (),
        setting: Setting | None = None,
    ) -> str:
        """Return one document over all reports."""
        return self.document(reports, setting or Setting())

    @abstractmethod
    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return the document."""
