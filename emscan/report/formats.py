"""Output formats: one class each, found by name."""

from __future__ import annotations

import json
from collections.abc import Sequence

from emscan.report.base import Document, Format, Page, Setting, Unaudited
from emscan.report.components import ComponentsFormat
from emscan.report.document import Report
from emscan.report.github import GithubFormat
from emscan.report.gitlab import GitlabFormat
from emscan.report.junit import JunitFormat
from emscan.report.markdown import MarkdownFormat
from emscan.report.sarif import SarifFormat
from emscan.report.table import render_text

__all__ = ["FORMATS", "Format", "Page", "Setting", "Unaudited"]


class TableFormat(Format):
    """The table as plain text."""

    name = "table"
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
        """Return the table."""
        return render_text(report, width, all_layers=all_layers, layers=layers)


class JsonFormat(Document):
    """The report document of schema version 1, in ASCII so that any stdout can carry it; never cut, folded or filtered."""

    name = "json"

    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return one JSON document; of several reports, or none, an array of documents."""
        documents = [report.to_dict() for report in reports]
        return json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, allow_nan=False)


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        TableFormat(), JsonFormat(), SarifFormat(), JunitFormat(), GithubFormat(), GitlabFormat(), MarkdownFormat(),
        ComponentsFormat(),
    )
}  # fmt: skip
