"""`emscan compare`: what changed from one checkpoint to another, or between two reports."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from emscan.cli.comparing import Auditor, note, one_of
from emscan.cli.interrupt import Interrupts
from emscan.cli.keys import with_options
from emscan.cli.output import check_output, emit, write_file
from emscan.cli.status import compared, interrupted
from emscan.compare.changes import TOLERANCE
from emscan.compare.changes import compare as compare_reports
from emscan.compare.document import Comparison
from emscan.compare.gate import HELP, condition
from emscan.compare.sources import is_report
from emscan.errors import UsageError
from emscan.policy.keys import RUN, THRESHOLD
from emscan.report.document import Report

_FORMATS = ("table", "json", "markdown")


@with_options(RUN, THRESHOLD)
def compare(
    old: str = typer.Argument(..., metavar="OLD", help="A report of --format json, or a saved model."),
    new: str = typer.Argument(..., metavar="NEW", help="Another one; - is a report on stdin."),
    trust: bool = typer.Option(False, "--trust", help="Load files that can run code (TorchScript, .pt2, any pickle)."),
    fail_on: list[str] = typer.Option([], metavar="KIND", help=HELP),
    tolerance: float = typer.Option(
        TOLERANCE, metavar="SHARE", help="Numbers that move by no more than this share are not listed."
    ),
    output_format: str = typer.Option("table", "--format", metavar="|".join(_FORMATS), help="What to write."),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write it there instead of stdout."),
    everything: bool = typer.Option(False, "--all", help="Show every row, finding and index in the table."),
    **options: Any,
) -> None:
    """Say what changed from OLD to NEW: verdicts, units that died or revived, load, information, findings.

    Saved models are audited, with the options of `emscan audit`; of two reports nothing is run.

    Exit status: 0 compared; 1 something that --fail-on names; 2 could not compare; 3 one of them is inconclusive.
    """
    one_of("--format", output_format, _FORMATS)
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g} is no share", "give a number from 0 to 1")
    if old == new == "-":
        raise UsageError("stdin can be one of the two", "give a file for the other")
    conditions = [condition(text) for text in fail_on]
    if output is not None:
        check_output(output, old, new)
    interrupts = Interrupts()
    auditor = Auditor(options, trust, interrupts)
    auditor.unused(old, new)
    try:
        first = auditor.report(old)
        _hint(old, first, new, options)
        second = auditor.report(new)
    except KeyboardInterrupt:
        print("emscan: interrupted: nothing was compared", file=sys.stderr)
        raise typer.Exit(interrupted(interrupts.signal)) from None
    found = compare_reports(first, second, tolerance=tolerance)
    found.gates = [one.judge(found) for one in conditions]
    _write(found, output_format, output, everything)
    raise typer.Exit(compared(found))


def _hint(old: str, report: Report, new: str, options: dict[str, Any]) -> None:
    """A report was made on some probe: name it where the other side would run on a synthetic one."""
    if is_report(old) and not is_report(new) and not options.get("probe") and not report.probe.synthetic:
        note(f"{old} is of the probe {report.probe.source}; without --probe {new} runs on a synthetic one")


def _write(found: Comparison, name: str, output: Path | None, everything: bool) -> None:
    from emscan.compare.table import render_markdown, render_text

    if name == "json":
        text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
    elif name == "markdown":
        text = render_markdown(found, everything=everything)
    else:
        width = 100 if output is not None else shutil.get_terminal_size((80, 24)).columns
        text = render_text(found, width, everything=everything)
    if output is not None:
        write_file(output, f"{text}\n")
    else:
        emit(text)
