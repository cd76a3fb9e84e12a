"""JUnit XML: what CI servers show as tests. A suite per model, a case per finding, a case that passes per clean layer."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from emscan.report.base import Document, Setting, Unaudited
from emscan.report.document import Finding, Report
from emscan.report.phrases import notice
from emscan.report.places import clipped, layers_by_index, named, place

_NAME = 300
_TEXT = 4_000
_KINDS = {"failure": "failures", "error": "errors", "skipped": "skipped"}


class JunitFormat(Document):
    """An error or a warning fails its case; a note passes; a suppressed finding is skipped; inconclusive is an error."""

    name = "junit"

    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return the XML document, in ASCII so that any encoding of stdout is the one it declares."""
        root = ET.Element("testsuites", name="emscan")
        names: Counter[str] = Counter()
        for report in reports:
            title = _unique(clipped(named(report), _NAME), names)
            _closed(_suite(root, report, title, setting))
        for one in setting.unaudited:
            _closed(_failed(root, one, _unique(clipped(one.path, _NAME), names)))
        for total in ("tests", "failures", "errors"):
            root.set(total, str(sum(int(suite.get(total, "0")) for suite in root)))
        ET.indent(root, " ")
        text: str = ET.tostring(root, encoding="us-ascii").decode()
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'


def _suite(root: ET.Element, report: Report, title: str, setting: Setting) -> ET.Element:
    suite = ET.SubElement(root, "testsuite", name=title)
    _properties(suite, report)
    rows = layers_by_index(report)
    prefix = _package(title)
    names: Counter[str] = Counter()
    told: set[int | None] = set()
    for finding in report.findings:
        row = rows.get(finding.layer_index) if finding.layer_index is not None else None
        about = f"{clipped(finding.layer, _NAME)}: " if finding.layer is not None else ""
        case = _case(suite, prefix, _unique(f"{about}{_rule(finding, setting)}", names))
        where = place(row, report, setting)
        _outcome(case, finding, f"{where.path}:{where.line}" if where.line else "")
        if finding.level != "note":
            told.add(finding.layer_index)
    for row in report.layers:
        if row.index not in told:
            _case(suite, prefix, _unique(f"{clipped(row.name, _NAME)}: {clipped(row.composition, 100)}", names))
    if report.summary.status == "inconclusive":
        case = _case(suite, prefix, _unique("coverage", names))
        _add(
            case, "error", "inconclusive", "not everything could be classified: this audit says nothing about the rest"
        )
    return suite


def _properties(suite: ET.Element, report: Report) -> None:
    """Add what the numbers have to be read with."""
    probe = report.probe
    held = {
        "format": report.model.format,
        "sha256": report.model.sha256 or "",
        "probe": f"{probe.source} ({probe.samples} samples)",
        "synthetic": str(probe.synthetic).lower(),
        "notice": notice(report) or "",
    }
    inner = ET.SubElement(suite, "properties")
    for name, value in held.items():
        if value:
            ET.SubElement(inner, "property", name=name, value=clipped(value, _NAME))


def _package(title: str) -> str:
    """Return a model's name as a class name: CI servers make a tree of what its dots part, which a file name must not."""
    return PurePath(title).as_posix().strip("/").replace(".", "_").replace("/", ".") or "model"


def _rule(finding: Finding, setting: Setting) -> str:
    page = setting.rules.get(finding.rule)
    return f"{finding.rule} {page.name}" if page is not None else finding.rule


def _case(suite: ET.Element, prefix: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=prefix, name=name, time="0")


def _outcome(case: ET.Element, finding: Finding, where: str) -> None:
    """Say how a case went; the text is all there is to know where only the test report is at hand."""
    lines = [
        finding.message,
        *([f"To do: {finding.help}"] if finding.help else []),
        *([f"At {where}"] if where else []),
    ]
    text = "\n".join(clipped(line, _TEXT) for line in lines)
    if finding.suppressed is not None:
        _add(case, "skipped", None, clipped(finding.suppressed, _NAME))
        ET.SubElement(case, "system-out").text = text
    elif finding.level == "note":
        ET.SubElement(case, "system-out").text = text
    else:
        _add(case, "failure", finding.level, finding.message, text)


def _add(case: ET.Element, tag: str, kind: str | None, message: str, text: str = "") -> None:
    node = ET.SubElement(case, tag, message=clipped(message, _TEXT))
    if kind is not None:
        node.set("type", kind)
    node.text = text or clipped(message, _TEXT)


def _failed(root: ET.Element, one: Unaudited, title: str) -> ET.Element:
    suite = ET.SubElement(root, "testsuite", name=title)
    case = ET.SubElement(suite, "testcase", classname=_package(title), name="audit", time="0")
    if one.skipped:
        _add(case, "skipped", None, one.why)
    else:
        _add(case, "error", "not audited", one.why)
    return suite


def _closed(suite: ET.Element) -> None:
    """Set a suite's counts from its cases."""
    suite.set("tests", str(len(suite.findall("testcase"))))
    for tag, total in _KINDS.items():
        suite.set(total, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("time", "0")


def _unique(name: str, seen: Counter[str]) -> str:
    """Return the name, numbered where it comes again: test reports know a case by its name."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name} ({seen[name]})"
