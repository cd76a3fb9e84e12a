"""`emscan rule`: the rules, or one explained."""

from __future__ import annotations

import difflib

import typer

from emscan.cli.keys import codes
from emscan.cli.output import emit
from emscan.errors import UsageError
from emscan.rules import RULES


def rule(
    code: str | None = typer.Argument(
        None, help="A code such as EM101, or a rule's name; without it, all are listed.", autocompletion=codes
    ),
) -> None:
    """List the rules, or explain one."""
    if code is None:
        for known in sorted(RULES):
            found = RULES[known]
            emit(f"{found.code}  {found.level:<8} {found.name:<24} {found.page.splitlines()[0]}")
        return
    wanted = next((r for r in RULES.values() if code.upper() == r.code or code.lower() == r.name), None)
    if wanted is None:
        near = difflib.get_close_matches(code.upper(), RULES, 1)
        raise UsageError(f"no rule {code}", f"did you mean {near[0]}?" if near else "`emscan rule` lists all")
    emit(f"{wanted.code} {wanted.name} ({wanted.level})\n\n{wanted.page}")
