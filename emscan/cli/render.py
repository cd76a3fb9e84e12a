"""`emscan render`: a saved report in any format, without the model and without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from emscan.cli.output import check_output
from emscan.cli.writing import FORMAT_HELP, check_format, write
from emscan.report.phrases import printable


def render(
    reports: list[str] = typer.Argument(..., metavar="REPORT...", help="Files of --format json; - is stdin."),
    output_format: str | None = typer.Option(None, "--format", metavar="FORMAT", help=FORMAT_HELP),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write it there instead of stdout."),
    all_layers: bool = typer.Option(False, "--all", help="Show every row by itself, those without competition too."),
    layer: list[str] = typer.Option(
        [], metavar="PATTERN", help="Show only rows whose name matches this glob, each by itself; may be repeated."
    ),
) -> None:
    """Write saved reports in another format.

    Exit status: 0 written; 2 could not.
    """
    check_format(output_format)
    if output is not None:
        check_output(output, *reports)
    from emscan.report.read import read_reports

    found = [report for path in reports for report in read_reports(path, _note)]
    write(found, output_format, output, all_layers=all_layers, layers=layer)


def _note(text: str) -> None:
    print(f"emscan: note: {printable(text)}", file=sys.stderr)
