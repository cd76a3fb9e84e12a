"""Report -> findings and summary."""

from __future__ import annotations

from emscan.report.base import Page
from emscan.report.document import Level, Report, Summary
from emscan.rules import (
    attention,
    calibration,
    dead,
    evidence,
    inconclusive,
    limits,
    numerics,
    responsibilities,
    structure,
)
from emscan.rules.registry import RULES, Rule

__all__ = ["FAMILIES", "LEVELS", "RULES", "Rule", "apply", "pages"]

FAMILIES = (structure, dead, responsibilities, attention, calibration, numerics, evidence, limits, inconclusive)
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


def apply(report: Report) -> None:
    """Fill ``report.findings``, worst first, and ``report.summary``."""
    found = [finding for code in sorted(RULES) for finding in RULES[code].findings(report)]
    found.sort(key=lambda f: (LEVELS.index(f.level), f.rule, f.layer_index if f.layer_index is not None else -1))
    report.findings = found
    report.summary = summarize(report)


def pages() -> dict[str, Page]:
    """Return the rules by code, as output formats explain them."""
    return {code: Page(code, rule.name, rule.level, rule.page) for code, rule in RULES.items()}


def summarize(report: Report) -> Summary:
    """Return the counts over rows, components and findings."""
    verdicts = [layer.verdict for layer in report.layers]
    parts = [layer.components for layer in report.layers if layer.components is not None]
    blind = bool(report.coverage.unclassified) or not report.layers
    return Summary(
        layers=len(verdicts),
        em=verdicts.count("em"),
        em_two_way=sum(layer.mechanism == "logistic" for layer in report.layers),
        soft=verdicts.count("soft"),
        hard=verdicts.count("hard"),
        none=verdicts.count("none"),
        components=sum(part.count for part in parts),
        dead=sum(len(part.dead) for part in parts),
        starved=sum(len(part.starved) for part in parts),
        findings=sum(finding.suppressed is None for finding in report.findings),
        status="inconclusive" if blind else "ok",
    )
