"""`emscan audit`: from a saved model to a report."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from emscan.cli.interrupt import Interrupts
from emscan.cli.masks import pruning_to
from emscan.cli.output import check_output, kept_stdout
from emscan.cli.running import Wanted, WantedProbe, run_audit, stopped_by_exit
from emscan.cli.status import check_fail_on, interrupted, parse_size, status
from emscan.cli.writing import FORMAT_HELP, check_format, write
from emscan.errors import UsageError
from emscan.policy.keys import OBJECTIVES
from emscan.report.document import Report, Thresholds

_LIMITS = Thresholds()


def audit(
    model: str = typer.Argument(..., metavar="MODEL", help="The saved model."),
    probe: str | None = typer.Option(
        None, metavar="SPEC",
        help="What to run it on: a file of tensors (.safetensors .npz .npy .pt), package.module:callable or "
        "file.py:callable giving batches, a folder of images, a text file, random[:normal|uniform]. Without it: "
        "synthetic, counts indicative.",
    ),
    probe_arg: list[str] = typer.Option(
        [], metavar="NAME=VALUE", help="How to read images or text, e.g. size=224; may be repeated."
    ),
    objective: str = typer.Option("auto", metavar="|".join(OBJECTIVES), help="The training objective on the output."),
    model_target: str | None = typer.Option(
        None, "--model", metavar="TARGET",
        help="The architecture where the file holds only weights: package.module:callable or file.py:callable.",
    ),
    model_arg: list[str] = typer.Option(
        [], metavar="NAME=VALUE", help="An argument for that callable, a Python literal or text; may be repeated."
    ),
    partial: bool = typer.Option(
        False, "--partial", help="Audit what fits where weights do not fill the architecture; the report lists the rest."
    ),
    trust: bool = typer.Option(False, "--trust", help="Load files that can run code (TorchScript, .pt2, any pickle)."),
    output_format: str | None = typer.Option(None, "--format", metavar="FORMAT", help=FORMAT_HELP),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write the report there instead of stdout."),
    prune_file: Path | None = typer.Option(
        None, metavar="FILE", help="Write masks of dead units there, .safetensors, for torch.nn.utils.prune."
    ),
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

    It reads no policy, so that the same command gives the same report anywhere: `emscan check` applies one.

    Exit status: 0 audited; 1 findings that --fail-on names; 2 could not audit; 3 inconclusive.
    """
    _one_of("--objective", objective, OBJECTIVES)
    check_format(output_format)
    wanted = check_fail_on(fail_on)
    memory = parse_size(max_memory)
    limits = Thresholds(
        rare=_share("--rare", rare), dormant=_share("--dormant", dormant), starved=_share("--starved", starved),
        hard=_share("--hard", hard), saturated=_share("--saturated", saturated),
    )  # fmt: skip
    if output is not None:
        check_output(output, model, probe)
    if prune_file is not None:
        check_output(prune_file, model, probe, option="--prune-file")
    interrupts = Interrupts()
    try:
        with kept_stdout():
            wanted_model = Wanted(model, model_target, model_arg, trust, partial, device)
            wanted_probe = WantedProbe(probe, probe_arg, batch_size, seed)
            report = run_audit(
                wanted_model, wanted_probe, objective, limits, memory, interrupts, pruning_to(prune_file)
            )
    except SystemExit as stop:  # its status would pass for one of ours
        raise stopped_by_exit(stop) from None
    except KeyboardInterrupt as stop:
        stopped: Report | None = getattr(stop, "report", None)
        if stopped is not None:
            write([stopped], output_format, output, all_layers=all_layers, layers=layer)
        print(f"emscan: interrupted{_how_far(stopped)}", file=sys.stderr)
        raise typer.Exit(interrupted(interrupts.signal)) from None
    code = status(report, wanted)
    write([report], output_format, output, all_layers=all_layers, layers=layer, exit_status=code)
    raise typer.Exit(code)


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
