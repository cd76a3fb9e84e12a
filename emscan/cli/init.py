"""`emscan init`: a policy to start from, written once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from emscan.cli.interrupt import Interrupts
from emscan.cli.keys import by_key, with_options
from emscan.cli.output import write_file
from emscan.cli.running import audit_by, stopped_by_exit
from emscan.cli.status import INTERRUPTED
from emscan.errors import UsageError
from emscan.policy import read_policy
from emscan.policy.find import OWN, SECTION, SHARED, parse, section
from emscan.policy.judge import judge
from emscan.policy.keys import RUN
from emscan.policy.write import starting_policy
from emscan.report.document import Report
from emscan.report.phrases import printable


@with_options(RUN)
def init(
    path: str | None = typer.Argument(None, metavar="[MODEL]", help="A saved model: limits start from what it shows."),
    pyproject: bool = typer.Option(
        False, "--pyproject", help="Append to pyproject.toml instead of writing emscan.toml."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an emscan.toml that is there."),
    trust: bool = typer.Option(False, "--trust", help="Load files that can run code (TorchScript, .pt2, any pickle)."),
    **options: Any,
) -> None:
    """Write a policy to the working directory: what the model shows now is allowed, more is not.

    Exit status: 0 written; 2 could not.
    """
    before = _before(pyproject, force)
    policy = read_policy(search=False, options=by_key(options))
    applied = policy.at(path)
    report = None
    try:
        if path is not None:
            report = audit_by(path, applied, trust, Interrupts())
    except SystemExit as stop:
        raise stopped_by_exit(stop) from None
    except KeyboardInterrupt:
        print("emscan: interrupted: nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    text = starting_policy(report, applied.settings, ".".join(SECTION) if pyproject else "")
    written = Path(SHARED if pyproject else OWN)
    write_file(written, before + text)
    print(f"emscan: wrote {written}", file=sys.stderr)
    if report is not None:
        _say(report, written, str(path))


def _before(pyproject: bool, force: bool) -> str:
    """Return what the policy goes after. Raises UsageError where one is there already."""
    path = Path(SHARED if pyproject else OWN)
    if pyproject and path.exists():
        text, document = parse(path)
        if section(document, path) is not None:
            raise UsageError(f"{path} has a [tool.emscan] already", "edit it, or take it out first")
        return f"{text.rstrip()}\n\n" if text.strip() else ""
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", "edit it, or replace it with --force")
    return ""


def _say(report: Report, path: Path, model: str) -> None:
    """Say what a check comes to right after: read back from the file, so that what it says is what will be."""
    judged = judge(report, read_policy(path))
    print(f"emscan: `emscan check {printable(model)}` now: {judged.outcome}", file=sys.stderr)
