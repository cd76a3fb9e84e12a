"""Loading and auditing one model for a command, with progress and interrupts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emscan.cli.interrupt import Interrupts
from emscan.cli.output import kept_stdout
from emscan.cli.progress import Progress
from emscan.cli.status import parse_size
from emscan.errors import ModelError
from emscan.policy import Applied
from emscan.report.document import Report, Thresholds
from emscan.report.phrases import printable

if TYPE_CHECKING:
    from emscan.load import LoadedModel
    from emscan.probe import Probe

After = Callable[["LoadedModel", "Probe", Report], None]


@dataclass(frozen=True)
class Wanted:
    """What to load, and how."""

    path: str
    target: str | None
    arguments: Sequence[str]
    trust: bool
    partial: bool
    device: str


@dataclass(frozen=True)
class WantedProbe:
    """What to run it on."""

    spec: str | None
    arguments: Sequence[str]
    batch_size: int | None
    seed: int


def run_audit(
    wanted: Wanted, probe: WantedProbe, objective: str, limits: Thresholds, memory: int | None, interrupts: Interrupts,
    after: After | None = None,
) -> Report:  # fmt: skip
    """Load, open the probe, audit. Warnings of torch and of the model's code stay off the terminal.

    ``after`` gets the model while it is there: loaded, its probe, the report.
    """
    from emscan.limits import bounded
    from emscan.load import load
    from emscan.pipeline import allowed_memory, probe_for, run
    from emscan.usercode import neighbours, parse_arguments, split_arguments

    arguments = parse_arguments(wanted.arguments, "--model-arg")
    reading = split_arguments(probe.arguments, "--probe-arg")
    with warnings.catch_warnings(), neighbours(wanted.target, first=False), neighbours(probe.spec, first=False):
        warnings.simplefilter("ignore")
        loaded = load(
            wanted.path, model_target=wanted.target, model_arguments=arguments, trust=wanted.trust,
            partial=wanted.partial, device=wanted.device,
        )  # fmt: skip
        for note in loaded.notes:
            print(f"emscan: note: {printable(note)}", file=sys.stderr)
        opened = None
        if loaded.module is not None:
            with bounded(allowed_memory(memory)):
                opened = probe_for(
                    loaded.module, probe.spec, arguments=reading, folder=_folder(wanted.path),
                    batch_size=probe.batch_size, seed=probe.seed, device=wanted.device, trust=wanted.trust,
                )  # fmt: skip
        with interrupts, Progress() as progress:
            report = run(
                loaded, opened, objective=objective, device=wanted.device, seed=probe.seed, thresholds=limits,
                max_memory=memory, progress=progress.step, hold=interrupts.hold,
            )  # fmt: skip
        for note in opened.notes if opened is not None else ():
            print(f"emscan: note: {printable(note)}", file=sys.stderr)
        if after is not None and opened is not None:
            after(loaded, opened, report)
        return report


def _folder(path: str) -> Path:
    """Return the model's folder, where its tokenizer and the settings of its images would be."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def audit_by(
    path: str, applied: Applied, trust: bool, interrupts: Interrupts, after: After | None = None
) -> Report:  # fmt: skip
    """Audit a model as a policy says. stdout stays free for the report."""
    get = applied.settings.get
    wanted = Wanted(path, get("model"), get("model-arg", ()), trust, get("partial", False), get("device", "cpu"))
    probe = WantedProbe(get("probe"), get("probe-arg", ()), get("batch-size"), get("seed", 0))
    objective, memory = get("objective", "auto"), parse_size(get("max-memory"))
    with kept_stdout():
        return run_audit(wanted, probe, objective, applied.thresholds, memory, interrupts, after)


def stopped_by_exit(stop: SystemExit) -> ModelError:
    """Return the error for a model that called exit(): its status would pass for one of ours."""
    return ModelError(f"the model's code called exit({stop.code!r})", "it must return its output")
