"""SARIF 2.1.0: what code hosts and editors read. A run per model, within the limits that GitHub sets."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from emscan.report.base import Document, Page, Setting, Unaudited
from emscan.report.document import Finding, Layer, Report
from emscan.report.places import (
    Place,
    clipped,
    layers_by_index,
    model_place,
    named,
    path_place,
    root_uri,
    sentence,
    source_place,
)

MOST_RESULTS = 25_000  # of a run
MOST_RUNS = 20  # of a file
MOST_BYTES = 10_000_000  # of a file, compressed
_MESSAGE = 1_000  # characters that are shown of a message
_TEXT = 1_024  # of a rule's description
_NAME = 255  # of anything's name
_COMPONENTS = 1_000  # indices that a result lists
_LEVELS = {"error": 0, "warning": 1, "note": 2}
_SEVERITY = {"error": "error", "warning": "warning", "note": "recommendation"}
_ROOT = "%SRCROOT%"
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

Node = dict[str, Any]


class SarifFormat(Document):
    """One log. Where there are more models than runs may be, the last run holds the rest."""

    name = "sarif"

    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return the log; if it came to more than a code host takes, with the mildest findings left out, and said so."""
        most = MOST_RESULTS
        while True:
            text = json.dumps(_log(reports, setting, most), indent=1, allow_nan=False)
            if len(text) <= MOST_BYTES or len(gzip.compress(text.encode(), 6)) <= MOST_BYTES or not most:
                return text
            most //= 2


@dataclass(frozen=True)
class _Found:
    """A finding with the report and the row that it belongs to."""

    finding: Finding
    report: Report
    layer: Layer | None


def _log(reports: Sequence[Report], setting: Setting, most: int) -> Node:
    """Return the log; ``most``: results in all runs of GitHub's limit, less where the file would be too large."""
    shared = MOST_RUNS if len(reports) > MOST_RUNS else len(reports)
    groups = [[report] for report in reports[: shared - 1]] + ([list(reports[shared - 1 :])] if reports else [])
    if not groups and setting.unaudited:
        groups = [[]]
    runs = [_run(group, setting, most, first=not place) for place, group in enumerate(groups)]
    seen: Counter[str] = Counter()
    for run in runs:  # a host takes no two runs of one name
        name = f"emscan/{run['automationDetails']['id']}"
        seen[name] += 1
        run["automationDetails"]["id"] = f"{name}/" if seen[name] == 1 else f"{name}-{seen[name]}/"
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": runs}


def _run(reports: Sequence[Report], setting: Setting, most: int, *, first: bool) -> Node:
    """Return the run of some models, usually one; the first tells of models that could not be audited, too."""
    found = [
        _Found(finding, report, rows.get(finding.layer_index) if finding.layer_index is not None else None)
        for report in reports
        for rows in (layers_by_index(report),)
        for finding in report.findings
    ]
    found.sort(key=lambda one: (one.finding.suppressed is not None, _LEVELS[one.finding.level]))
    kept = found[:most]
    codes = sorted({one.finding.rule for one in kept})
    places = {code: i for i, code in enumerate(codes)}
    driver: Node = {
        "name": "emscan",
        "rules": [_rule(code, setting, (one.finding for one in kept if one.finding.rule == code)) for code in codes],
    }
    if reports:
        driver["version"] = clipped(reports[0].tool.get("version", ""), _NAME)
    return {
        "tool": {"driver": driver},
        "automationDetails": {"id": _identity(reports, setting)},
        "originalUriBaseIds": {_ROOT: {"uri": root_uri(setting)}},
        "columnKind": "unicodeCodePoints",
        "artifacts": [_artifact(report, setting) for report in reports],
        "results": [_result(one, places[one.finding.rule], setting) for one in kept],
        "invocations": [_invocation(reports, setting, len(found) - len(kept), first=first)],
    }


def _identity(reports: Sequence[Report], setting: Setting) -> str:
    """Return what tells one model's run from another's: code hosts replace the earlier run of the same name."""
    if len(reports) != 1:
        return "models"
    return model_place(reports[0], setting).uri.removeprefix("file:///")[:_NAME]


def _rule(code: str, setting: Setting, found: Iterable[Finding]) -> Node:
    """Return a rule's descriptor, its page as help; a rule that is not known here has its level alone."""
    page = setting.rules.get(code)
    if page is None:
        level = min((f.level for f in found), key=_LEVELS.__getitem__)
        return {"id": code, "name": code, "defaultConfiguration": {"level": level}}
    first, full = _described(page)
    return {
        "id": code,
        "name": "".join(word.capitalize() for word in page.name.split("-")),
        "shortDescription": {"text": first[:_TEXT]},
        "fullDescription": {"text": full[:_TEXT]},
        "defaultConfiguration": {"level": page.level},
        "help": {"text": page.text, "markdown": markdown_page(page)},
        "properties": {"tags": ["emscan"], "problem.severity": _SEVERITY[page.level]},
    }


def _described(page: Page) -> tuple[str, str]:
    """Return the first sentence of a page, and the paragraph that says what the rule finds."""
    parts = [" ".join(part.split()) for part in page.text.split("\n\n")]
    full = next(
        (part.removeprefix("What it finds: ") for part in parts if part.startswith("What it finds: ")), parts[0]
    )
    return parts[0], full[:1].upper() + full[1:]


def markdown_page(page: Page) -> str:
    """Return a rule's page as Markdown: its lead words stand out."""
    return re.sub(r"(?m)^([A-Z][A-Za-z ]+:) ", r"**\1** ", f"# {page.code} {page.name}\n\n{page.text}")


def _artifact(report: Report, setting: Setting) -> Node:
    hashes = {"hashes": {"sha-256": report.model.sha256}} if report.model.sha256 else {}
    return {"location": _location(model_place(report, setting)), "roles": ["analysisTarget"], **hashes}


def _location(where: Place) -> Node:
    return {"uri": where.uri, **({"uriBaseId": _ROOT} if where.inside else {})}


def _physical(where: Place) -> Node:
    """Return a physical location; a checkpoint has no lines, so that it is named whole."""
    region = {"region": {"startLine": where.line}} if where.line is not None else {}
    return {"artifactLocation": _location(where), **region}


def _result(one: _Found, rule: int, setting: Setting) -> Node:
    finding = one.finding
    model, line = model_place(one.report, setting), source_place(one.layer, setting)
    location: Node = {"physicalLocation": _physical(line or model)}
    if finding.layer is not None:
        name = clipped(finding.layer, _MESSAGE)
        location["logicalLocations"] = [
            {
                "name": name.rpartition(".")[2][:_NAME] or name[:_NAME] or "model",
                "fullyQualifiedName": name,
                "kind": "module",
            }
        ]
    result: Node = {
        "ruleId": finding.rule,
        "ruleIndex": rule,
        "level": finding.level,
        "message": {"text": _plain(sentence(finding))},
    }
    if location:
        result["locations"] = [location]
    if line is not None and model is not None:
        result["relatedLocations"] = [
            {"id": 1, "physicalLocation": _physical(model), "message": {"text": "checkpoint"}}
        ]
    if finding.fingerprint:
        # the second is the one that GitHub goes by; a checkpoint has no line that it could compute one from
        result["partialFingerprints"] = {
            "emscan/v1": finding.fingerprint,
            "primaryLocationLineHash": finding.fingerprint,
        }
    if finding.suppressed is not None:
        result["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": clipped(finding.suppressed, _MESSAGE)}
        ]
    properties: Node = {}
    if finding.components:
        properties = {"components": finding.components[:_COMPONENTS], "componentCount": len(finding.components)}
    if one.layer is not None:
        properties["composition"] = clipped(one.layer.composition, _NAME)
        properties["mechanism"] = one.layer.mechanism
    return {**result, **({"properties": properties} if properties else {})}


def _plain(text: str) -> str:
    """Return a message: SARIF reads [text](1) as a link and {0} as a placeholder, which names may look like."""
    text = re.sub(r"([\\\[\]])", r"\\\1", clipped(text, _MESSAGE)) if "](" in text else clipped(text, _MESSAGE)
    return re.sub(r"\{(\d+)\}", r"{{\1}}", text)


def _invocation(reports: Sequence[Report], setting: Setting, cut: int, *, first: bool) -> Node:
    """Return how the run went. It is no success where a probe was interrupted or a model could not be audited."""
    failed = [one for one in setting.unaudited if not one.skipped] if first else []
    skipped = [one for one in setting.unaudited if one.skipped] if first else []
    stopped = [report for report in reports if report.probe.partial]
    notes = [_notification("error", f"{one.path}: could not be audited: {one.why}", one, setting) for one in failed]
    notes += [_notification("note", f"{one.path}: skipped: {one.why}", one, setting) for one in skipped]
    notes += [_notification("error", f"{named(report)}: the probe was interrupted") for report in stopped]
    notes += [
        _notification("warning", f"{named(report)}: inconclusive: not everything could be classified")
        for report in reports
        if report.summary.status == "inconclusive"
    ]
    if cut:
        notes.append(_notification("warning", f"{cut:,} findings left out, the mildest: a code host takes no more"))
    status = {"exitCode": setting.exit_status} if setting.exit_status is not None else {}
    return {"executionSuccessful": not (failed or stopped), **status, "toolExecutionNotifications": notes}


def _notification(level: str, text: str, about: Unaudited | None = None, setting: Setting | None = None) -> Node:
    node: Node = {"level": level, "message": {"text": _plain(text)}}
    if about is not None and setting is not None:
        node["locations"] = [{"physicalLocation": _physical(path_place(about.path, setting))}]
    return node
