"""`emscan trend`: what became of the components over a training run's checkpoints."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from emscan.cli.comparing import Auditor, note, one_of
from emscan.cli.interrupt import Interrupts
from emscan.cli.keys import with_options
from emscan.cli.output import check_output, emit, write_file
from emscan.cli.status import interrupted, trended
from emscan.compare.chart import ASCII, BLOCKS, Look, render_csv, render_text
from emscan.compare.expand import expanded
from emscan.compare.order import Placed, ordered
from emscan.compare.series import Series, Trend
from emscan.errors import EmscanError
from emscan.policy.keys import RUN, THRESHOLD
from emscan.report.phrases import printable

_FORMATS = ("table", "json", "csv")


@with_options(RUN, THRESHOLD)
def trend(
    checkpoints: list[str] = typer.Argument(
        ...,
        metavar="CHECKPOINT...",
        help="Saved models or reports: files, a pattern in quotes, or the folder of a Lightning or Trainer run.",
    ),
    trust: bool = typer.Option(False, "--trust", help="Load files that can run code (TorchScript, .pt2, any pickle)."),
    output_format: str = typer.Option("table", "--format", metavar="|".join(_FORMATS), help="What to write."),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write it there instead of stdout."),
    everything: bool = typer.Option(False, "--all", help="Show every checkpoint, row and index in the table."),
    ascii_only: bool = typer.Option(False, "--ascii", help="Draw sparklines without Unicode blocks."),
    **options: Any,
) -> None:
    """Say how dead, rare, dormant and starved components, entropy and information go over checkpoints.

    One model is in memory at a time; all run on the same probe. A checkpoint that cannot be audited is reported and
    left out, and the exit status is 2.

    Exit status: 0 all audited; 2 one could not be; 3 one is inconclusive.
    """
    one_of("--format", output_format, _FORMATS)
    found = expanded(checkpoints, note)
    if output is not None:
        check_output(output, *(one.path for one in found))
    auditor = Auditor(options, trust, interrupts := Interrupts())
    auditor.unused(*(one.path for one in found))
    placed, how = ordered(found, note)
    series = Series(how)
    try:
        _audit_all(placed, auditor, series)
    except KeyboardInterrupt:
        done = len(series.trend.checkpoints)
        if done:
            _write(series.done(), output_format, output, everything, ascii_only)
        print(f"emscan: interrupted: {done} of {len(placed)} checkpoints were audited", file=sys.stderr)
        raise typer.Exit(interrupted(interrupts.signal)) from None
    result = series.done()
    _write(result, output_format, output, everything, ascii_only)
    raise typer.Exit(trended(result))


def _audit_all(placed: Sequence[Placed], auditor: Auditor, series: Series) -> None:
    for place, one in enumerate(placed):
        path = one.candidate.path
        if sys.stderr.isatty():
            print(f"emscan: {place + 1} of {len(placed)}: {printable(path)}", file=sys.stderr)
        try:
            report = auditor.saved(path, one.candidate.place) if one.candidate.report else auditor.report(path)
        except EmscanError as error:
            _failed(series, one, str(error), error.traceback)
        except Exception as error:
            if os.environ.get("EMSCAN_DEBUG"):
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _failed(series, one, f"internal error: {what}; this is a bug in emscan, EMSCAN_DEBUG=1 shows where", "")
        else:
            series.add(report, path, one.step, one.label)
            del report
        gc.collect()  # modules refer to each other: the next model would come beside this one


def _failed(series: Series, one: Placed, why: str, traceback: str) -> None:
    """One checkpoint that fails does not stop the others; why is said at once."""
    for line in traceback.splitlines():
        print(printable(line), file=sys.stderr)
    print(f"emscan: error: {printable(why)}", file=sys.stderr)
    series.fail(one.candidate.path, one.step, one.label, why)


def _write(result: Trend, name: str, output: Path | None, everything: bool, ascii_only: bool) -> None:
    if name == "json":
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    elif name == "csv":
        text = render_csv(result)
    else:
        width = 100 if output is not None else shutil.get_terminal_size((80, 24)).columns
        blocks = ASCII if ascii_only or (output is None and not _draws()) else BLOCKS
        text = render_text(result, Look(width, everything, blocks))
    end = "\r\n" if name == "csv" else "\n"
    if output is not None:
        write_file(output, f"{text}{end}")
    else:
        emit(text, end)


def _draws() -> bool:
    """Whether stdout can carry the blocks of a sparkline."""
    if sys.stdout is None or os.environ.get("TERM") == "dumb":
        return False
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
