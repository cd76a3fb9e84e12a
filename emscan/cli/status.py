"""The exit status, computed in one place from the report and --fail-on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from emscan.errors import UsageError
from emscan.policy import Outcome
from emscan.policy.selectors import counts
from emscan.report.document import Report
from emscan.rules import LEVELS, RULES

if TYPE_CHECKING:
    from emscan.compare.document import Comparison
    from emscan.compare.series import Trend

OK, FINDINGS, FAILED, INCONCLUSIVE = 0, 1, 2, 3  # precedence: 2, 1, 3, 0
INTERRUPTED = 130  # as shells report SIGINT; SIGTERM is 143


def check_fail_on(names: list[str]) -> list[str]:
    """Return the levels and codes of --fail-on in their own spelling. Raises UsageError for one that is neither."""
    found: list[str] = []
    for name in names:
        level, code = name.lower(), name.upper()
        if level in LEVELS:
            found.append(level)
        elif code in RULES:
            found.append(code)
        else:
            near = difflib.get_close_matches(code, RULES, 1) or difflib.get_close_matches(level, LEVELS, 1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(LEVELS)} or a code that `emscan rule` lists"
            raise UsageError(f"--fail-on {name}: no such level or code", hint)
    return found


def status(report: Report, fail_on: list[str]) -> int:
    """Return the exit status: findings that --fail-on names (a level counts itself and worse), then inconclusive."""
    if any(counts(finding, fail_on) for finding in report.findings):
        return FINDINGS
    return INCONCLUSIVE if report.summary.status == "inconclusive" else OK


def worst(outcomes: Iterable[Outcome]) -> int:
    """Return the exit status of `emscan check` over its models: one that failed, findings, inconclusive, else 0."""
    found = set(outcomes)
    ranked: tuple[tuple[Outcome, int], ...] = (
        ("failed", FAILED), ("findings", FINDINGS), ("inconclusive", INCONCLUSIVE)
    )  # fmt: skip
    return next((code for outcome, code in ranked if outcome in found), OK)


def compared(found: Comparison) -> int:
    """Return the exit status of `emscan compare`: a condition of --fail-on that is not met, then inconclusive."""
    if not all(gate.met for gate in found.gates):
        return FINDINGS
    return INCONCLUSIVE if "inconclusive" in (found.old.status, found.new.status) else OK


def trended(found: Trend) -> int:
    """Return the exit status of `emscan trend`: a checkpoint that failed, then one that is inconclusive."""
    states = {one.status for one in found.checkpoints}
    return FAILED if "failed" in states else INCONCLUSIVE if "inconclusive" in states else OK


def parse_size(text: str | None) -> int | None:
    """Return the bytes of a size like 512M, 4G or 800MiB. Raises UsageError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if not found or float(found[1]) <= 0:
        raise UsageError(f"--max-memory {text} is no size", "give bytes or a number with K, M, G or T, e.g. 4G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def interrupted(signal: int | None) -> int:
    """Return the exit status of an audit that a signal has ended, as shells report it."""
    return 128 + signal if signal is not None else INTERRUPTED
