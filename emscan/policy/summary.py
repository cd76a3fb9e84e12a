"""What `emscan check` prints: a line per model, the findings that count with their indices, and the sums."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from emscan.policy.document import Policy
from emscan.policy.find import shown
from emscan.policy.judge import OUTCOMES, Judgement
from emscan.report.document import Finding
from emscan.report.phrases import printable
from emscan.rules.words import listed

_WORDS = {
    "findings": "with findings",
    "failed": "failed",
    "inconclusive": "inconclusive",
    "suppressed": "suppressed only",
    "skipped": "skipped",
    "clean": "clean",
}
_SHOWN = 5  # indices that a message lists by itself
_LINES = 3  # of indices below a finding


def summary(judged: Sequence[Judgement], policy: Policy, width: int) -> str:
    """Return the table of `emscan check` in at most ``width`` columns, but for paths and codes."""
    lines = [line for one in judged for line in _model(one, width)]
    lines += ["", *_wrapped(_sums(judged), width), _policy(judged, policy)]
    return "\n".join(printable(line) for line in lines)


def _model(one: Judgement, width: int) -> Iterator[str]:
    yield from _wrapped(f"{one.path}: {_outcome(one)}", width, "  ")
    for finding in one.counted:
        yield from _finding(finding, width)


def _outcome(one: Judgement) -> str:
    report = one.report
    if report is None:
        return f"{one.outcome}: {one.why.removeprefix(f'cannot load {one.path}: ')}"
    said: str = "suppressed only" if one.outcome == "suppressed" else one.outcome
    if one.counted:
        said = f"{len(one.counted)} finding{'s' if len(one.counted) > 1 else ''}"
    about = []
    if one.outcome == "inconclusive":
        ops = sorted({unknown.op for unknown in report.coverage.unclassified})
        about.append(f"not classified: {', '.join(ops[:4])}" if ops else "nothing was classified")
    reasons = Counter((f.suppressed or "").split(":")[0] for f in report.findings if f.suppressed)
    hidden = reasons["ignore"] + reasons["baseline"]
    if hidden:
        about.append(f"{hidden} suppressed")
    if report.probe.synthetic:
        about.append("synthetic probe: counts are indicative")
    return f"{said} ({'; '.join(about)})" if about else said


def _finding(finding: Finding, width: int) -> Iterator[str]:
    message = finding.message
    if len(finding.components) > _SHOWN:  # all of them follow
        message = message.replace(f" ({listed(finding.components)})", "")
    yield from _wrapped(f"  {finding.rule} {finding.level} {message}", width, "    ")
    if len(finding.components) > _SHOWN:
        lines = textwrap.wrap(", ".join(_ranges(finding.components)), max(20, width - 13), break_on_hyphens=False)
        cut = len(lines) > _LINES
        for place, line in enumerate(lines[:_LINES]):
            last = cut and place == _LINES - 1
            yield f"    {'indices: ' if not place else '         '}{line}{' ...' if last else ''}"


def _ranges(indices: Sequence[int]) -> Iterator[str]:
    """Yield sorted indices, three or more in a row as a range: 0-3, 7, 9."""
    start = last = indices[0]
    for index in (*indices[1:], None):
        if index is not None and index == last + 1:
            last = index
            continue
        if last - start >= 2:
            yield f"{start}-{last}"
        else:
            yield from (str(i) for i in range(start, last + 1))
        if index is not None:
            start = last = index


def _sums(judged: Sequence[Judgement]) -> str:
    number = Counter(one.outcome for one in judged)
    parts = ", ".join(f"{number[outcome]} {_WORDS[outcome]}" for outcome in OUTCOMES if number[outcome])
    findings = [finding for one in judged if one.report is not None for finding in one.report.findings]
    hidden = sum((f.suppressed or "").startswith(("ignore", "baseline")) for f in findings)
    counted = sum(len(one.counted) for one in judged)
    models = f"{len(judged)} model{'s' if len(judged) != 1 else ''}"
    return f"{models}: {parts or 'none'}. {counted} finding{'s' if counted != 1 else ''}, {hidden} suppressed."


def _policy(judged: Sequence[Judgement], policy: Policy) -> str:
    if policy.source is not None:
        return f"Policy: {shown(policy.source)}."
    if any(one.outcome == "findings" for one in judged):
        return "Policy: none; `emscan init MODEL` writes one that starts from what is there."
    return "Policy: none."


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, max(30, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
