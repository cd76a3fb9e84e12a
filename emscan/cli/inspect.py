"""`emscan inspect`: what is in a file, without running anything from it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import typer

from emscan.cli.output import check_output, emit, write_file
from emscan.errors import UsageError

_FORMATS = ("table", "json")


def inspect(
    path: str = typer.Argument(..., metavar="FILE", help="A file or a folder."),
    check_values: bool = typer.Option(False, "--check-values", help="Read the tensors and count NaN and Inf."),
    output_format: str = typer.Option("table", "--format", metavar="|".join(_FORMATS), help="What to write."),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write it there instead of stdout."),
    all_tensors: bool = typer.Option(False, "--all", help="Show every tensor, file, module and import in the table."),
) -> None:
    """Say what is in a file: tensors, metadata, what its pickles would import, and how to audit it.

    Nothing in the file runs; tensors are not read unless --check-values. Exit status: 0 inspected; 2 could not.
    """
    if output_format not in _FORMATS:
        raise UsageError(f"--format {output_format}: no such choice", f"use one of {', '.join(_FORMATS)}")
    if output is not None:
        check_output(output, path)
    from emscan.inspect import inspect as inspect_file
    from emscan.inspect.table import render_text, renderable

    found = inspect_file(path, check_values=check_values)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size((80 if terminal else 100, 24)).columns
    if output_format == "json":
        text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
    elif output is None and terminal and "utf" in sys.stdout.encoding.lower():
        from rich.console import Console

        Console(highlight=False, width=width).print(renderable(found, width, everything=all_tensors))
        return
    else:
        text = render_text(found, 100 if output is not None else width, everything=all_tensors)
    if output is not None:
        write_file(output, f"{text}\n")
    else:
        emit(text)
