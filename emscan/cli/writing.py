"""Writing reports in a format: what goes to stdout or a file, and what GitHub Actions gets besides.

stdout carries the report alone. In Actions, where no --format is given and stdout is no terminal, the table stays there;
annotations go to stderr, which the runner reads for them just as well, and the job summary to its file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emscan.cli.output import emit, write_file
from emscan.errors import UsageError
from emscan.report.document import Report
from emscan.report.phrases import printable

if TYPE_CHECKING:
    from emscan.report.base import Setting, Unaudited

FORMAT_NAMES = ("table", "json", "sarif", "junit", "github", "gitlab", "markdown", "csv")
FORMAT_HELP = f"What to write: {', '.join(FORMAT_NAMES)}. Default: table, in GitHub Actions with annotations."
_ROOTS = ("GITHUB_WORKSPACE", "CI_PROJECT_DIR")  # the checkout, which code hosts name files from


def check_format(name: str | None, option: str = "--format") -> None:
    """Raise UsageError where --format names none."""
    if name is not None and name not in FORMAT_NAMES:
        raise UsageError(f"{option} {name}: no such choice", f"use one of {', '.join(FORMAT_NAMES)}")


def write(
    reports: Sequence[Report],
    name: str | None,
    output: Path | None,
    *,
    all_layers: bool = False,
    layers: Sequence[str] = (),
    exit_status: int | None = None,
    unaudited: Sequence[Unaudited] = (),
    table: str | None = None,
) -> None:
    """Write reports to stdout, or to the file ``output``, in the format that --format names (None: it was not given).

    ``exit_status``: what the process will exit with; ``unaudited``: models without a report; ``table``: what a command
    has in place of the reports' tables. Raises UsageError where the
    file or stdout cannot be written, or a glob of ``layers`` names nothing.
    """
    from emscan.report.formats import FORMATS

    fmt = FORMATS[name or "table"]
    context = setting(exit_status, unaudited)
    if layers and not fmt.tables:
        _check_layers(reports, layers, fmt.name)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size((80 if terminal else 100, 24)).columns
    if output is None and fmt.name == "table" and table is None and terminal and "utf" in sys.stdout.encoding.lower():
        _draw(reports, width, all_layers, layers)
    else:
        wide = width if output is None else 100
        if table is not None and fmt.name == "table":
            text = table
        else:
            text = fmt.render_many(reports, width=wide, all_layers=all_layers, layers=layers, setting=context)
        if output is not None:
            write_file(output, f"{text}{fmt.end}" if text else "")
        elif text:
            emit(text, fmt.end)
    if os.environ.get("GITHUB_ACTIONS") == "true" and (fmt.name == "github" or (name is None and not terminal)):
        _tell_actions(reports, context, annotate=fmt.name != "github")


def setting(exit_status: int | None = None, unaudited: Sequence[Unaudited] = ()) -> Setting:
    """Return what formats need to know: where the process runs, and the rules' pages."""
    from emscan.report.base import Setting
    from emscan.rules import pages

    folder = Path(os.environ.get("PWD") or "/")
    with contextlib.suppress(OSError):  # the working directory may be gone
        folder = Path.cwd()
    roots = [Path(os.environ[name]) for name in _ROOTS if os.environ.get(name)]
    root = next((one for one in roots if folder.is_relative_to(one)), None)
    return Setting(folder, root, pages(), exit_status, tuple(unaudited))


def _check_layers(reports: Sequence[Report], layers: Sequence[str], name: str) -> None:
    """A misspelled name is an error whatever the format."""
    from emscan.report.select import matching

    for report in reports:
        matching(report, layers)
    print(f"emscan: note: --layer concerns the table; {name} has every layer", file=sys.stderr)


def _draw(reports: Sequence[Report], width: int, all_layers: bool, layers: Sequence[str]) -> None:
    """Print the table in colours."""
    from rich.console import Console

    from emscan.report.table import renderable

    console = Console(highlight=False, width=width)
    for place, report in enumerate(reports):
        if place:
            console.print()
        console.print(renderable(report, width, all_layers=all_layers, layers=layers))


def _tell_actions(reports: Sequence[Report], context: Setting, *, annotate: bool) -> None:
    """Print the annotations on stderr and append to the job summary."""
    from emscan.report.formats import FORMATS
    from emscan.report.markdown import SUMMARY_BYTES, summary

    if annotate and (text := FORMATS["github"].render_many(reports, setting=context)):
        print(text, file=sys.stderr)
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        taken = Path(path).stat().st_size if Path(path).exists() else 0
        markdown = summary(FORMATS["markdown"].render_many(reports, setting=context), SUMMARY_BYTES - taken)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{markdown}\n" if markdown else "")
    except OSError as error:
        print(f"emscan: note: no job summary: {printable(error.strerror or str(error))}", file=sys.stderr)
