"""The command line: the only place that prints, reads options or sets the exit status."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from emscan._version import __version__
from emscan.cli import audit, check, compare, init, inspect, render, rule, schema, trend
from emscan.cli.status import FAILED, INTERRUPTED
from emscan.errors import EmscanError
from emscan.report.phrases import printable

app = typer.Typer(
    name="emscan",
    help="Where a neural network has expectation-maximization structure, and which of its components are dead.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("audit")(audit.audit)
app.command("check")(check.check)
app.command("compare")(compare.compare)
app.command("init")(init.init)
app.command("inspect")(inspect.inspect)
app.command("render")(render.render)
app.command("rule")(rule.rule)
app.command("schema")(schema.schema)
app.command("trend")(trend.trend)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"emscan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Where a neural network has expectation-maximization structure, and which of its components are dead."""


def main() -> None:
    """Run the command line; every failure is one line on stderr and exit status 2."""
    try:
        app()
    except EmscanError as error:
        for line in error.traceback.splitlines():
            print(printable(line), file=sys.stderr)
        _fail(f"error: {error}")
    except KeyboardInterrupt:
        print("emscan: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("EMSCAN_DEBUG"):
            traceback.print_exc()
        what = " ".join(str(error).split())[:300]
        _fail(f"internal error: {type(error).__name__}: {what}; this is a bug in emscan, EMSCAN_DEBUG=1 shows where")


def _fail(message: str) -> None:
    """Exit with one line; what a file or a name brought along must not steer the terminal."""
    print(f"emscan: {printable(message)}", file=sys.stderr)
    raise SystemExit(FAILED) from None
