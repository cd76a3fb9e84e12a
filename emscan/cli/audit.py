"""`emscan audit`: from a saved model to a report."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import typer

from emscan.cli.interrupt import Interrupts
from emscan.cli.output import check_output, emit, kept_stdout, write_file
from emscan.cli.progress import Progress
from emscan.cli.status import check_fail_on, interrupted, parse_size, status
from emscan.errors import ModelError, UsageError
from emscan.report.document import Report, Thresholds
from emscan.report.phrases import printable

_FORMATS = ("table", "json")
_OBJECTIVES = ("auto", "cross-entropy", "bce", "free-energy", "none")
_LIMITS = Thresholds()


def audit(
    model: str = typer.Argument(..., metavar="MODEL", help="The saved model."),
    probe: str | None = typer.Option(
        None, metavar="SPEC",
        help="What to run it on: a file of tensors (.safetensors .npz .npy .pt), package.module:callable or "
        "file.py:callable giving batches, random[:normal|uniform]. Without it: synthetic, counts indicative.",
    ),
    objective: str = typer.Option("auto", metavar="|".join(_OBJECTIVES), help="The training objective on the output."),
    model_target: str | None = typer.Option(
        None, "--model", metavar="TARGET",
        help="The architecture where the file holds only weights: package.module:callable or file.py:callable.",
    ),
    trust: bool = typer.Option(False, "--trust", help="Load files that can run code (TorchScript, .pt2, any pickle)."),
    output_format: str = typer.Option("table", "--format", metavar="|".join(_FORMATS), help="What to write."),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write the report there instead of stdout."),
    batch_size: int | None = typer.Option(None, metavar="N", help="Samples at a time."),
    device: str = typer.Option("cpu", metavar="D", help="Where to run, e.g. cpu or cuda."),
    seed: int = typer.Option(0, metavar="N", help="Seed of synthetic probes and of randomness in the model."),
    all_layers: bool = typer.Option(False, "--all", help="Show every row by itself, those without competition too."),
    layer: list[str] = typer.Option(
        [], metavar="PATTERN", help="Show only rows whose name matches this glob, each by itself; may be repeated."
    ),
    fail_on: list[str] = typer.Option([], metavar="LEVEL|CODE", help="Exit 1 on such findings; may be repeated."),
    max_memory: str | None = typer.Option(None, metavar="SIZE", help="Most memory for activations, e.g. 4G."),
    rare: float = typer.Option(_LIMITS.rare, metavar="SHARE", help="A unit on for less than this is rare."),
    dormant: float = typer.Option(_LIMITS.dormant, metavar="SHARE", help="Mean output below this share of the layer's: dormant."),
    starved: float = typer.Option(_LIMITS.starved, metavar="SHARE", help="Load below this share of 1/K: starved."),
    hard: float = typer.Option(_LIMITS.hard, metavar="R", help="max r at or above this: a hard competition."),
    saturated: float = typer.Option(_LIMITS.saturated, metavar="R", help="Two-way r at or above this: saturated."),
) -> None:  # fmt: skip
    """Audit a saved model: where EM structure exists, what is dead, how responsibility is spread.

    Exit status: 0 audited; 1 findings that --fail-on names; 2 could not audit; 3 inconclusive.
    """
    _one_of("--objective", objective, _OBJECTIVES)
    _one_of("--format", output_format, _FORMATS)
    wanted = check_fail_on(fail_on)
    memory = parse_size(max_memory)
    limits = Thresholds(
        rare=_share("--rare", rare), dormant=_share("--dormant", dormant), starved=_share("--starved", starved),
        hard=_share("--hard", hard), saturated=_share("--saturated", saturated),
    )  # fmt: skip
    if output is not None:
        check_output(output, model, probe)
    interrupts = Interrupts()
    try:
        with kept_stdout():
            report = _run(
                model, probe, objective, model_target, trust, batch_size, device, seed, limits, memory, interrupts
            )
    except SystemExit as stop:  # its status would pass for one of ours
        raise ModelError(f"the model's code called exit({stop.code!r})", "it must return its output") from None
    except KeyboardInterrupt as stop:
        partial: Report | None = getattr(stop, "report", None)
        if partial is not None:
            _write(partial, output_format, output, all_layers, layer)
        print(f"emscan: interrupted{_how_far(partial)}", file=sys.stderr)
        raise typer.Exit(interrupted(interrupts.signal)) from None
    _write(report, output_format, output, all_layers, layer)
    raise typer.Exit(status(report, wanted))


def _how_far(partial: Report | None) -> str:
    if partial is None:
        return ""
    samples, batches = partial.probe.samples, partial.probe.batches
    return f": the report is partial, of {samples:,} samples in {batches:,} batch{'es' if batches != 1 else ''}"


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: no such choice", f"use one of {', '.join(choices)}")


def _share(option: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UsageError(f"{option} {value:g} is no share", "give a number from 0 to 1")
    return value


def _run(
    path: str, spec: str | None, objective: str, target: str | None, trust: bool, batch_size: int | None, device: str,
    seed: int, limits: Thresholds, memory: int | None, interrupts: Interrupts,
) -> Report:  # fmt: skip
    """Load, open the probe, audit. Warnings of torch and of the model's code stay off the terminal."""
    from emscan.load import load
    from emscan.pipeline import probe_for, run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load(path, model_target=target, trust=trust, device=device)
        for note in loaded.notes:
            print(f"emscan: note: {printable(note)}", file=sys.stderr)
        opened = None
        if loaded.module is not None:
            opened = probe_for(loaded.module, spec, batch_size=batch_size, seed=seed, device=device, trust=trust)
        with interrupts, Progress() as progress:
            return run(
                loaded, opened, objective=objective, device=device, seed=seed, thresholds=limits, max_memory=memory,
                progress=progress.step, hold=interrupts.hold,
            )  # fmt: skip


def _write(report: Report, name: str, output: Path | None, all_layers: bool, layers: list[str]) -> None:
    from emscan.report.formats import FORMATS
    from emscan.report.select import matching

    if layers and name != "table":
        matching(report, layers)  # a misspelled name is an error here, too
        print(f"emscan: note: --layer concerns the table; {name} has every layer", file=sys.stderr)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size((80 if terminal else 100, 24)).columns
    if output is not None:
        write_file(output, FORMATS[name].render(report, width=100, all_layers=all_layers, layers=layers) + "\n")
    elif name == "table" and terminal and "utf" in sys.stdout.encoding.lower():
        from rich.console import Console

        from emscan.report.table import renderable

        Console(highlight=False, width=width).print(renderable(report, width, all_layers=all_layers, layers=layers))
    else:
        emit(FORMATS[name].render(report, width=width, all_layers=all_layers, layers=layers))
