"""Output formats: one class each, found by name."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence

from emscan.report.document import Report
from emscan.report.table import render_text


class Format(ABC):
    """Turns a report into text."""

    name: str

    @abstractmethod
    def render(self, report: Report, *, width: int, all_layers: bool, layers: Sequence[str] = ()) -> str:
        """Return the report as text; ``width`` in columns, ``all_layers`` and the globs ``layers`` concern tables only."""


class TableFormat(Format):
    """The table as plain text."""

    name = "table"

    def render(self, report: Report, *, width: int, all_layers: bool, layers: Sequence[str] = ()) -> str:
        """Return the table."""
        return render_text(report, width, all_layers=all_layers, layers=layers)


class JsonFormat(Format):
    """The report document of schema version 1."""

    name = "json"

    def render(self, report: Report, *, width: int, all_layers: bool, layers: Sequence[str] = ()) -> str:
        """Return one JSON document, in ASCII so that any stdout can carry it; never cut, folded or filtered."""
        return json.dumps(report.to_dict(), indent=1, allow_nan=False)


FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (TableFormat(), JsonFormat())}
