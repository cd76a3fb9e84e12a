"""`emscan schema`: the JSON Schema of the report."""

from __future__ import annotations

import json

from emscan.cli.output import emit
from emscan.report.schema import schema as report_schema


def schema() -> None:
    """Print the JSON Schema of the report."""
    emit(json.dumps(report_schema(), indent=1))
