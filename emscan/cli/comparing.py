"""A saved report as it is, or the audit of a checkpoint: what commands that take either share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from emscan.cli.interrupt import Interrupts
from emscan.cli.keys import by_key
from emscan.cli.running import audit_by, stopped_by_exit
from emscan.compare.sources import is_report, reports_of
from emscan.errors import ReportError, UsageError
from emscan.policy import Policy, read_policy
from emscan.report.document import Report
from emscan.report.phrases import printable


class Auditor:
    """Gives the report of a path, with the options of the command. It reads no policy, as `emscan audit`."""

    def __init__(self, options: Mapping[str, Any], trust: bool, interrupts: Interrupts) -> None:
        self._given = by_key(options)
        self._policy: Policy = read_policy(search=False, options=self._given)
        self._trust = trust
        self._interrupts = interrupts

    def report(self, path: str) -> Report:
        """Return the one report that a file holds, or that an audit of the checkpoint gives."""
        if is_report(path):
            return self.saved(path, None)
        try:
            return audit_by(path, self._policy.at(path), self._trust, self._interrupts)
        except SystemExit as stop:
            raise stopped_by_exit(stop) from None

    def saved(self, path: str, place: int | None) -> Report:
        """Return a report of a file; ``place`` None: it has to be the only one."""
        found = reports_of(path, note)
        if place is None and len(found) != 1:
            raise ReportError(f"{path} holds {len(found)} reports, one is needed", "give a file with a single report")
        return found[place or 0]

    def unused(self, *paths: str) -> None:
        """Say so where options concern audits and there is none."""
        if self._given and all(is_report(path) for path in paths):
            names = ", ".join(f"--{name}" for name in self._given)
            note(f"{names}: without effect, these are reports and nothing is audited")


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError for a value that is none of the choices."""
    if value not in choices:
        raise UsageError(f"{option} {value}: no such choice", f"use one of {', '.join(choices)}")


def note(text: str) -> None:
    """Say something on stderr."""
    print(f"emscan: note: {printable(text)}", file=sys.stderr)
