"""What the consumers of each format accept, as far as a program can say it."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jsonschema
import xmlschema
from markdown_it import MarkdownIt

SCHEMAS = Path(__file__).parent.parent / "schemas"
SARIF = jsonschema.Draft4Validator(json.loads((SCHEMAS / "sarif-schema-2.1.0.json").read_text()))
JUNIT = xmlschema.XMLSchema(str(SCHEMAS / "junit-10.xsd"))
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
MARKUP = {"link_open", "image", "em_open", "strong_open", "html_inline", "html_block", "code_inline"}
COMMAND = re.compile(r"::(error|warning|notice) ([^:]*)::([^\r\n]*)")
SEVERITIES = {"info", "minor", "major", "critical", "blocker"}


def sarif(text: str) -> dict:
    """Against the official schema, and what it cannot say: indices, URIs, GitHub's limits."""
    log = json.loads(text)
    SARIF.validate(log)
    assert len(log["runs"]) <= 20
    names = [run["automationDetails"]["id"] for run in log["runs"]]
    assert len(set(names)) == len(names)
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        assert len(run["results"]) <= 25_000
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            assert 1 <= len(result["locations"]) <= 1_000
            assert len(result["message"]["text"]) <= 1_100
            for location in (*result["locations"], *result.get("relatedLocations", ())):
                artifact = location["physicalLocation"]["artifactLocation"]
                uri(artifact["uri"], relative="uriBaseId" in artifact)
        for rule in rules:
            assert len(rule["name"]) <= 255
    return log


def uri(text: str, *, relative: bool) -> str:
    """Return the path that a URI names: it is ASCII, percent-encoded, and of the scheme that it should be."""
    assert re.fullmatch(r"[A-Za-z0-9\-._~!$&'()*+,;=@:/%]+", text), text
    assert not re.search(r"%(?![0-9A-Fa-f]{2})", text)
    parts = urlsplit(text)
    assert parts.scheme == ("" if relative else "file")
    assert not parts.netloc
    assert relative != parts.path.startswith("/")
    return unquote(parts.path)


def junit(text: str) -> ET.Element:
    """Against the schema of Jenkins; counts add up, and no case comes twice."""
    JUNIT.validate(text)
    root = ET.fromstring(text)
    assert text.isascii()
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        for tag, total in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(total)) == len([case for case in cases if case.find(tag) is not None])
        assert all(len([c for c in case if c.tag != "system-out"]) <= 1 for case in cases)
    keys = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(keys)) == len(keys)
    return root


def github(text: str) -> list[tuple[str, dict[str, str], str]]:
    """Every line is one workflow command, read as the runner reads it; no more of a level than it shows."""
    found = []
    for line in text.split("\n") if text else ():
        match = COMMAND.fullmatch(line)
        assert match, line
        properties = {}
        for part in match[2].split(","):
            name, _, value = part.partition("=")
            assert name in {"file", "line", "title"}
            properties[name] = _unescaped(value.replace("%3A", ":").replace("%2C", ","))
        found.append((match[1], properties, _unescaped(match[3])))
    for level in ("error", "warning", "notice"):
        assert sum(one[0] == level for one in found) <= 10
    return found


def _unescaped(text: str) -> str:
    assert not re.search(r"%(?!25|0D|0A)", text), text
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def gitlab(text: str) -> list[dict]:
    """The fields that GitLab requires; a fingerprint comes once."""
    issues = json.loads(text)
    for issue in issues:
        assert set(issue) == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["description"]
        assert issue["check_name"]
        assert issue["severity"] in SEVERITIES
        assert re.fullmatch("[0-9a-f]{64}", issue["fingerprint"])
        assert issue["location"]["path"]
        assert not issue["location"]["path"].startswith("./")
        assert type(issue["location"]["lines"]["begin"]) is int
        assert issue["location"]["lines"]["begin"] >= 1
    prints = [issue["fingerprint"] for issue in issues]
    assert len(set(prints)) == len(prints)
    return issues


def components(text: str) -> list[dict[str, str]]:
    """RFC 4180: CRLF alone ends lines, every row has the columns of the head; nothing that a spreadsheet would run."""
    assert text.endswith("\r\n")
    assert "\n" not in text.replace("\r\n", "")
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert all(len(row) == len(rows[0]) for row in rows)
    for row in rows[1:]:
        for name, cell in zip(rows[0], row, strict=True):
            if name not in {"stuck_at", "variance", "gradient"}:
                assert not cell.lstrip().startswith(("=", "+", "-", "@", "\t", "\r")), cell
            else:
                assert cell == "" or float(cell) is not None
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def markdown(text: str) -> dict[str, list]:
    """Return the cells of tables per row, and the markup that there is."""
    tokens = MARKDOWN.parse(text)
    rows: list[list[str]] = []
    markup: list[tuple[str, str]] = []
    plain: list[str] = []
    for token, before in zip(tokens, [None, *tokens], strict=False):
        if token.type == "tr_open":
            rows.append([])
        if token.type == "html_block":
            markup.append((token.type, token.content))
        if token.type == "inline":
            content = "".join(child.content for child in token.children)
            if before.type in {"td_open", "th_open"}:
                rows[-1].append(content)
            plain.append("".join(c.content if c.type == "text" else "\0" for c in token.children))
            markup += [(child.type, child.content) for child in token.children if child.type in MARKUP]
    return {"rows": rows, "markup": markup, "plain": plain, "blocks": [t.type for t in tokens if t.level == 0]}
