"""A report and a policy -> what counts: findings suppressed with their reason, limits as findings, one outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from emscan import rules
from emscan.policy.document import Applied, Ignore, Override, Policy
from emscan.policy.selectors import counts, selects
from emscan.report.document import Finding, Report
from emscan.rules.limits import MEASURES, described, limit_for, matches

Outcome = Literal["clean", "findings", "suppressed", "inconclusive", "skipped", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("findings", "failed", "inconclusive", "suppressed", "skipped", "clean")
_ALWAYS = ("EM5", "EM9")  # a limit was asked for; what makes an audit inconclusive is never a matter of taste
_BLIND = ("EM901", "EM902")  # why an audit is inconclusive


class Known(Protocol):
    """What has seen a report before: sets ``suppressed`` of findings that are neither new nor worse."""

    def apply(self, report: Report) -> object:
        """Mark the findings."""


@dataclass
class Judgement:
    """What a model comes to. ``why``: of one that was skipped or could not be audited.

    ``counted``: the findings that the exit status rests on. ``applied``: the policy that was used.
    """

    path: str
    outcome: Outcome
    report: Report | None = None
    counted: list[Finding] = field(default_factory=list)
    why: str = ""
    applied: Applied | None = None


def judge(report: Report, policy: Policy, baseline: Known | None = None) -> Judgement:
    """Apply a policy to a report in place: limits become findings, and what does not count says why."""
    applied = policy.at(report.model.path)
    report.policy = applied.info()
    rules.apply(report)  # with the limits
    if applied.select:
        report.findings = [f for f in report.findings if any(selects(s, f) for s in (*applied.select, *_ALWAYS))]
    for finding in report.findings:
        finding.suppressed = _reason(finding, report, applied)
    if baseline is not None:
        baseline.apply(report)
    report.summary = rules.summarize(report)
    counted = [finding for finding in report.findings if _counts(finding, applied)]
    return Judgement(report.model.path or "model", _outcome(report, applied, counted), report, counted, "", applied)


def _counts(finding: Finding, applied: Applied) -> bool:
    """A limit that is not met counts whatever ``fail-on`` says: it was asked for."""
    return counts(finding, (*applied.fail_on, "EM5"))


def _reason(finding: Finding, report: Report, applied: Applied) -> str | None:
    for ignore in applied.ignores:
        if _ignores(ignore, finding):
            return f"ignore: {ignore.rule}{f' in {ignore.layers[0]}' if ignore.layers else ''} ({ignore.where})"
    row = next((layer for layer in report.layers if layer.index == finding.layer_index), None)
    if row is None:
        return None
    for measure in MEASURES.values():
        limit = limit_for(applied.limits, measure.name, row)
        if limit is not None and finding.rule in measure.decides and measure.counts == bool(finding.components):
            return f"limit: {described(limit)} decides"
    return None


def _ignores(ignore: Ignore, finding: Finding) -> bool:
    if not finding.rule.startswith(ignore.rule):
        return False
    if ignore.layers is None:
        return True
    return finding.layer is not None and any(matches(glob, finding.layer) for glob in ignore.layers)


def _outcome(report: Report, applied: Applied, counted: Sequence[Finding]) -> Outcome:
    if counted:
        return "findings"
    blind = [f for f in report.findings if f.rule in _BLIND]
    accepted = blind and all((f.suppressed or "").startswith("ignore") for f in blind)
    if report.summary.status == "inconclusive" and not accepted:
        return "inconclusive"
    hidden = [f for f in report.findings if (f.suppressed or "").startswith(("ignore", "baseline"))]
    if accepted or any(any(selects(s, f) for s in (*applied.fail_on, "EM5")) for f in hidden):
        return "suppressed"
    return "clean"


def stale(policy: Policy, judged: Sequence[Judgement]) -> list[str]:
    """Return a sentence for every ignore, override and table that matched nothing in any of the models.

    Nothing is said where a model was not audited: it could be the one.
    """
    if not judged or any(one.report is None or one.applied is None for one in judged):
        return []
    said = [
        f"{p.where}: no model matches {', '.join(p.models or ())}"
        for p in policy.unused_tables([j.path for j in judged])
    ]
    ignores: dict[Ignore, bool] = {}
    overrides: dict[int, tuple[Override, bool]] = {}
    for one in judged:
        assert one.report is not None
        assert one.applied is not None
        names = [layer.name for layer in one.report.layers]
        for ignore in one.applied.ignores:
            used = any(_ignores(ignore, finding) for finding in one.report.findings)
            ignores[ignore] = ignores.get(ignore, False) or used
        for override in one.applied.overrides:
            used = any(matches(glob, name) for glob in override.layers for name in names)
            overrides[id(override)] = override, overrides.get(id(override), (override, False))[1] or used
    unmatched = [override for override, used in overrides.values() if not used]
    said += [f"{override.where}: no layer matches {', '.join(override.layers)}" for override in unmatched]
    lost = {glob for override in unmatched for glob in override.layers}
    for ignore, used in ignores.items():
        if not used and not (ignore.layers and set(ignore.layers) <= lost):  # said already
            where = f" in {', '.join(ignore.layers)}" if ignore.layers else ""
            said.append(f"{ignore.where}: ignore {ignore.rule}{where} matches no finding")
    return said
