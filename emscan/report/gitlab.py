"""GitLab code quality: a JSON array that merge requests show, of errors, warnings and notes that count."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from emscan.report.base import Document, Setting
from emscan.report.document import Report
from emscan.report.places import Place, clipped, layers_by_index, named, path_place, place, sentence

_SEVERITY = {"error": "critical", "warning": "major", "note": "info"}
_TEXT = 2_000


class GitlabFormat(Document):
    """Suppressed findings are left out: the format knows no other way."""

    name = "gitlab"

    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return the array."""
        seen: Counter[str] = Counter()
        issues = [issue for report in reports for issue in _issues(report, setting, seen)]
        for one in setting.unaudited:
            if not one.skipped:
                where = path_place(one.path, setting)
                text = f"could not be audited: {one.why}"
                issues.append(_issue(text, "not-audited", "blocker", where, ("not-audited", where.path), seen))
        return json.dumps(issues, indent=1, allow_nan=False)


def _issues(report: Report, setting: Setting, seen: Counter[str]) -> list[dict[str, Any]]:
    rows = layers_by_index(report)
    out = []
    for finding in report.findings:
        if finding.suppressed is not None:
            continue
        row = rows.get(finding.layer_index) if finding.layer_index is not None else None
        where = place(row, report, setting)
        about = (report.model.path or "", finding.fingerprint or f"{finding.rule}\0{finding.layer}\0{finding.message}")
        text = sentence(finding)
        if where.line is not None:
            text = f"{named(report)}: {text}"  # the same line runs other checkpoints, too
        out.append(_issue(text, finding.rule, _SEVERITY[finding.level], where, about, seen))
    return out


def _issue(
    text: str, check: str, severity: str, where: Place, about: tuple[str, ...], seen: Counter[str]
) -> dict[str, Any]:
    """Return an issue. A checkpoint has no lines, but the format wants one: the first."""
    return {
        "description": clipped(text, _TEXT),
        "check_name": check,
        "fingerprint": _fingerprint(about, seen),
        "severity": severity,
        "location": {"path": clipped(where.path, _TEXT), "lines": {"begin": where.line or 1}},
    }


def _fingerprint(about: tuple[str, ...], seen: Counter[str]) -> str:
    """Return what GitLab knows an issue by; of those with the same one it shows only the first."""
    text = "\0".join(about)
    seen[text] += 1
    return hashlib.sha256(f"{text}\0{seen[text]}".encode("utf-8", "surrogatepass")).hexdigest()
