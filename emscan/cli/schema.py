"""`emscan schema`: the JSON Schema of the report, an inspection, a comparison or a trend."""

from __future__ import annotations

import json

import typer

from emscan.cli.output import emit
from emscan.errors import UsageError


def schema(
    document: str = typer.Argument("report", metavar="[report|inspect|compare|trend]", help="Which document's schema."),
) -> None:
    """Print the JSON Schema of the report, or of what `emscan inspect`, `compare` or `trend` writes."""
    if document == "report":
        from emscan.report.schema import schema as wanted
    elif document == "inspect":
        from emscan.inspect.schema import schema as wanted
    elif document == "compare":
        from emscan.compare.schema import comparison_schema as wanted
    elif document == "trend":
        from emscan.compare.schema import trend_schema as wanted
    else:
        raise UsageError(f"no schema {document}", "use one of report, inspect, compare, trend")
    emit(json.dumps(wanted(), indent=1))
