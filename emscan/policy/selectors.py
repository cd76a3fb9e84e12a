"""What names rules in a policy: a code (EM101), the beginning of codes (EM1), or a rule's name (dead-unit)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from emscan.report.document import Finding
from emscan.rules import LEVELS, RULES


def selector(text: str) -> str:
    """Return the code or beginning of codes that a text names. Raises ValueError with what to write instead."""
    code = text.strip().upper()
    if code in RULES or (code.startswith("EM") and any(known.startswith(code) for known in RULES)):
        return code
    named = text.strip().lower().replace("_", "-")
    for rule in RULES.values():
        if rule.name == named:
            return rule.code
    near = difflib.get_close_matches(code, RULES, 1) or difflib.get_close_matches(named, _names(), 1)
    advice = f"did you mean {near[0]}?" if near else "`emscan rule` lists all"
    raise ValueError(f"no rule {text!r}; {advice}")


def level_or_selector(text: str) -> str:
    """Return a level as it is, else as ``selector``."""
    level = text.strip().lower()
    if level in LEVELS:
        return level
    near = difflib.get_close_matches(level, LEVELS, 1)
    if near and not text.strip().upper().startswith("EM"):
        raise ValueError(f"no level or rule {text!r}; did you mean {near[0]}?")
    return selector(text)


def _names() -> list[str]:
    return [rule.name for rule in RULES.values()]


def selects(name: str, finding: Finding) -> bool:
    """Whether a selector names the rule of a finding, or a level the finding is of or worse than."""
    if name in LEVELS:
        return LEVELS.index(finding.level) <= LEVELS.index(name)
    return finding.rule.startswith(name)


def counts(finding: Finding, fail_on: Iterable[str]) -> bool:
    """Whether a finding is one that ``fail_on`` names, and nothing suppresses it."""
    return finding.suppressed is None and any(selects(name, finding) for name in fail_on)
