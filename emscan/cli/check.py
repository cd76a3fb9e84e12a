"""`emscan check`: a policy applied to one or many checkpoints, and the exit status that follows."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from emscan.cli.interrupt import Interrupts
from emscan.cli.keys import by_key, with_options
from emscan.cli.output import check_output, write_file
from emscan.cli.running import audit_by, stopped_by_exit
from emscan.cli.status import FAILED, OK, interrupted, worst
from emscan.cli.writing import FORMAT_HELP, check_format, write
from emscan.errors import EmscanError, UsageError
from emscan.policy import Judgement, Policy, judge, read_policy, stale
from emscan.policy.judge import Known
from emscan.policy.keys import FILES, LIMIT, RULES_OPTION, RUN, THRESHOLD
from emscan.report.phrases import printable

if TYPE_CHECKING:
    from emscan.compare.baseline import Baseline
    from emscan.report.document import Report


@with_options(RULES_OPTION, RUN, FILES, LIMIT, THRESHOLD)
def check(
    models: list[str] = typer.Argument(..., metavar="MODEL...", help="Saved models; a pattern in quotes is expanded."),
    config: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="The policy; without it the nearest emscan.toml, or pyproject.toml with [tool.emscan].",
    ),
    no_config: bool = typer.Option(False, "--no-config", help="Read no policy file."),
    trust: bool = typer.Option(False, "--trust", help="Load files that can run code (TorchScript, .pt2, any pickle)."),
    output_format: str | None = typer.Option(None, "--format", metavar="FORMAT", help=FORMAT_HELP),
    output: Path | None = typer.Option(None, metavar="FILE", help="Write there instead of stdout."),
    update_baseline: bool = typer.Option(
        False, "--update-baseline", help="Write what is found to the --baseline file; findings do not count this time."
    ),
    also: list[str] = typer.Option([], metavar="FORMAT=FILE", help="Write this format there besides; may be repeated."),
    **options: Any,
) -> None:
    """Apply a policy to saved models. Options outrank the environment (EMSCAN_*), and that the policy file.

    Exit status: 0 clean, or only what is suppressed or skipped; 1 findings; 2 a model could not be audited; 3 a model
    is inconclusive; of several the first in the order 2, 1, 3, 0.
    """
    check_format(output_format)
    policy = _policy(config, no_config, by_key(options))
    paths = _expanded(models)
    if output is not None:
        check_output(output, *paths)
    besides = [_format_and_file(one, paths) for one in also]
    baseline = _baseline(policy, paths, update_baseline)
    judged, stopped = _judge_all(paths, policy, trust, None if update_baseline else baseline)
    for sentence in (*stale(policy, judged), *(baseline.stale() if baseline and not update_baseline else ())):
        _note(sentence)
    code = interrupted(stopped) if stopped is not None else worst(one.outcome for one in judged)
    if update_baseline and stopped is None:
        _update(policy, judged, baseline)
        code = OK if code != FAILED else code
    for name, file in besides:
        _write(judged, policy, name, file, code)
    _write(judged, policy, output_format, output, code)
    raise typer.Exit(code)


def _policy(config: Path | None, no_config: bool, options: dict[str, Any]) -> Policy:
    if config is not None and no_config:
        raise UsageError("--config and --no-config contradict each other", "leave one out")
    named = config or (Path(os.environ["EMSCAN_CONFIG"]) if os.environ.get("EMSCAN_CONFIG") else None)
    policy = read_policy(
        None if no_config else named, search=not no_config, environment=os.environ, options=options
    )  # fmt: skip
    for note in policy.notes:
        _note(note)
    return policy


def _format_and_file(text: str, paths: Sequence[str]) -> tuple[str, Path]:
    """Return the two parts of --also. Raises UsageError for a wrong one, before anything runs."""
    name, equals, file = text.partition("=")
    if not equals or not file:
        raise UsageError(f"--also {text}: no file", "write FORMAT=FILE, e.g. junit=report.xml")
    check_format(name, "--also")
    check_output(Path(file), *paths, option="--also")
    return name, Path(file)


def _expanded(models: Sequence[str]) -> list[str]:
    """Return the paths once each, patterns that the shell did not expand among them expanded."""
    found: dict[str, None] = {}
    for model in models:
        names = [model]
        if not Path(model).exists() and any(character in model for character in "*?["):
            names = sorted(glob.glob(model, recursive=True)) or [model]  # noqa: PTH207 - absolute ones, too
        found |= dict.fromkeys(names)
    return list(found)


def _baseline(policy: Policy, paths: Sequence[str], update: bool) -> Baseline | None:
    """Return the baseline; one that is to be written need not be there."""
    files = policy.setting("baseline") or ()
    if update and len(files) != 1:
        raise UsageError("--update-baseline needs one file", "name it with --baseline, or as baseline in the policy")
    if not files or (update and not Path(files[0]).exists()):
        return None
    from emscan.compare.baseline import read_baseline

    return read_baseline(files, paths, note=_note)


def _update(policy: Policy, judged: Sequence[Judgement], before: Baseline | None) -> None:
    """Write the baseline: the models of this run, and those of the file that were not part of it."""
    from emscan.compare.baseline import baseline_text

    path = Path(policy.setting("baseline")[0])
    reports = [one.report for one in judged if one.report is not None]
    kept = _kept(before, [one.path for one in judged])
    write_file(path, baseline_text([*reports, *kept], path.parent) + "\n")
    more = f", {len(kept)} kept as they were" if kept else ""
    print(f"emscan: wrote the baseline {printable(str(path))} ({len(reports)} checked{more})", file=sys.stderr)


def _kept(before: Baseline | None, paths: Sequence[str]) -> list[Report]:
    """Return the reports of models that were not checked now, their paths absolute."""
    if before is None or before.alone:
        return []
    now = {Path(path).resolve() for path in paths}
    rest = [known for known in before.known if known.paths and not now & {place.resolve() for place in known.paths}]
    return [replace(k.report, model=replace(k.report.model, path=str(k.paths[0]))) for k in rest]


def _judge_all(
    paths: Sequence[str], policy: Policy, trust: bool, baseline: Known | None
) -> tuple[list[Judgement], int | None]:
    """Judge every model, whatever becomes of the others; the second is the signal that stopped it, None without one."""
    judged: list[Judgement] = []
    for path in paths:
        interrupts = Interrupts()
        try:
            judged.append(_judge(path, policy, trust, baseline, interrupts))
        except KeyboardInterrupt:
            judged.append(Judgement(path, "failed", why="interrupted"))
            return judged, interrupts.signal or 2
    return judged, None


def _judge(path: str, policy: Policy, trust: bool, baseline: Known | None, interrupts: Interrupts) -> Judgement:
    glob_ = policy.skips(path)
    if glob_ is not None:
        return Judgement(path, "skipped", why=f"skip {glob_}")
    try:
        unread = _unsupported(path) if policy.setting("skip-unsupported") else None
        if unread is not None:
            return Judgement(path, "skipped", why=f"it is {unread}, which emscan does not read")
        return judge(audit_by(path, policy.at(path), trust, interrupts), policy, baseline)
    except EmscanError as error:
        return _failed(path, str(error), error.traceback)
    except SystemExit as stop:
        return _failed(path, str(stopped_by_exit(stop)))
    except Exception as error:
        if os.environ.get("EMSCAN_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return _failed(path, f"internal error: {what}; this is a bug in emscan, EMSCAN_DEBUG=1 shows where")


def _failed(path: str, why: str, traceback: str = "") -> Judgement:
    """One file that fails does not stop the others; why is said at once."""
    for line in traceback.splitlines():
        print(printable(line), file=sys.stderr)
    print(f"emscan: error: {printable(why)}", file=sys.stderr)
    return Judgement(path, "failed", why=why)


def _unsupported(path: str) -> str | None:
    """Return what a file is that emscan knows and does not read, None for any other."""
    from emscan.inspect.otherfile import FOREIGN
    from emscan.load.foreign import describe
    from emscan.load.registry import formats
    from emscan.load.source import RefusalError, Source

    try:
        if not Path(path).is_file():
            return None
        source = Source.read(path)
        if any(candidate.matches(source) for candidate in formats()):
            return None
        what = describe(source)[0]
        return what if what in FOREIGN else None
    except RefusalError:
        return None  # the audit says why


def _write(judged: Sequence[Judgement], policy: Policy, name: str | None, output: Path | None, code: int) -> None:
    from emscan.policy.summary import summary
    from emscan.report.base import Unaudited

    reports = [one.report for one in judged if one.report is not None]
    unaudited = [Unaudited(one.path, one.why, one.outcome == "skipped") for one in judged if one.report is None]
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size((80 if terminal else 100, 24)).columns
    table = summary(judged, policy, width if output is None else 100)
    write(reports, name, output, exit_status=code, unaudited=unaudited, table=table)


def _note(text: str) -> None:
    print(f"emscan: note: {printable(text)}", file=sys.stderr)
