"""SARIF: where results are anchored, what is suppressed, and what a code host takes at most."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pytest

from emscan import rules
from emscan.report import sarif as module
from emscan.report.document import Finding
from emscan.report.formats import FORMATS
from emscan.report.sarif import markdown_page
from tests.report.builder import gate, report, seed
from tests.report.formats import validators
from tests.report.formats.samples import ROOT, SETTING, UNAUDITED, many, mixed


def log(*reports, setting=SETTING) -> dict:
    return validators.sarif(FORMATS["sarif"].render_many(reports, setting=setting))


def results(*reports, setting=SETTING) -> list[dict]:
    return [result for run in log(*reports, setting=setting)["runs"] for result in run["results"]]


def anchors(found: list[dict]) -> dict[str, tuple[str, int | None]]:
    places = {}
    for result in found:
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        name = location.get("logicalLocations", [{"fullyQualifiedName": ""}])[0]["fullyQualifiedName"]
        places[name] = (physical["artifactLocation"]["uri"], physical.get("region", {}).get("startLine"))
    return places


def test_results_are_at_the_users_own_line_else_at_the_checkpoint() -> None:
    checkpoint = ("runs/step%201/model.pt", None)
    assert anchors(results(mixed())) == {
        "body.0": ("src/net.py", 12),
        "body.2": checkpoint,  # an installed package's line
        "body.4": checkpoint,  # no line is known
        "head": checkpoint,  # a line in a virtual environment below the root
        "": checkpoint,
    }
    (own,) = [r for r in results(mixed()) if "relatedLocations" in r]
    assert own["relatedLocations"][0]["physicalLocation"]["artifactLocation"]["uri"] == checkpoint[0]


@pytest.mark.parametrize(
    ("path", "uri", "inside"),
    [
        ("model.pt", "model.pt", True),
        ("./a/../b/model.pt", "b/model.pt", True),
        ("/project/x/model.pt", "x/model.pt", True),
        ("/projects/model.pt", "file:///projects/model.pt", False),
        ("../other/model.pt", "file:///other/model.pt", False),
        ("a b/ü#1?%.pt", "a%20b/%C3%BC%231%3F%25.pt", True),
        ("c:model.pt", "c%3Amodel.pt", True),
        ("/tmp/a:b.pt", "file:///tmp/a%3Ab.pt", False),
        ("bad\udcff.pt", "bad%FF.pt", True),  # bytes that are no UTF-8
        ("half\ud800.pt", "half%ED%A0%80.pt", True),
        ("zero\x00.pt", "zero%00.pt", True),
        (None, "model", True),
    ],
)
def test_uris(path: str | None, uri: str, inside: bool) -> None:
    made = report(gate(0, "a", dead=[1]))
    made.model.path = path
    (result,) = results(made)
    artifact = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert artifact["uri"] == uri
    assert ("uriBaseId" in artifact) == inside


def test_a_checkout_above_the_folder_names_the_files() -> None:
    inner = dataclasses.replace(SETTING, folder=ROOT / "runs", root=ROOT)
    made = report(gate(0, "a", dead=[1]))
    assert anchors(results(made, setting=inner)) == {"a": ("runs/model.pt", None)}
    assert log(made, setting=inner)["runs"][0]["originalUriBaseIds"]["%SRCROOT%"]["uri"] == "file:///project/"


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    made = report(gate(0, "a", dead=[1]))
    made.model.path = str(tmp_path / "real" / "model.pt")
    setting = dataclasses.replace(SETTING, folder=tmp_path / "link")
    assert anchors(results(made, setting=setting)) == {"a": ("model.pt", None)}


def test_levels_suppressions_and_fingerprints() -> None:
    found = {
        r["locations"][0].get("logicalLocations", [{"name": "-"}])[0].get("fullyQualifiedName", "-"): r
        for r in results(mixed())
    }
    made = {f.layer or "-": f for f in mixed().findings}
    assert {name: r["level"] for name, r in found.items()} == {name: f.level for name, f in made.items()}
    assert {name: r["partialFingerprints"]["emscan/v1"] for name, r in found.items()} == {
        name: f.fingerprint for name, f in made.items()
    }
    held = {name: r["suppressions"][0]["justification"] for name, r in found.items() if "suppressions" in r}
    assert held == {"body.2": "ignore: body.2", "body.4": "baseline"}
    assert found["body.0"]["properties"]["components"] == [1, 5]


def test_rules_carry_their_pages() -> None:
    (run,) = log(mixed())["runs"]
    listed = {rule["id"]: rule for rule in run["tool"]["driver"]["rules"]}
    assert set(listed) == {"EM101", "EM401", "EM903"}
    for code, rule in listed.items():
        assert rule["help"]["text"] == rules.RULES[code].page
        assert "**What to do:**" in rule["help"]["markdown"]
        assert rule["defaultConfiguration"]["level"] == rules.RULES[code].level
    assert listed["EM101"]["name"] == "DeadUnit"


def test_every_page_has_its_lead_words() -> None:
    for page in rules.pages().values():
        assert markdown_page(page).startswith(f"# {page.code} {page.name}\n\n")


def test_a_rule_that_is_not_known_here_is_named_all_the_same() -> None:
    made = report(gate(0, "a"))
    made.findings = [Finding("EM599", "error", "what a later version finds")]
    (run,) = log(made)["runs"]
    assert run["tool"]["driver"]["rules"] == [
        {"id": "EM599", "name": "EM599", "defaultConfiguration": {"level": "error"}}
    ]


def test_the_invocation_says_how_it_went() -> None:
    def invocation(made, **options) -> dict:
        return log(made, setting=dataclasses.replace(SETTING, **options))["runs"][0]["invocations"][0]

    assert invocation(seed()) == {"executionSuccessful": True, "exitCode": 1, "toolExecutionNotifications": []}
    assert "exitCode" not in invocation(seed(), exit_status=None)
    stopped = seed()
    stopped.probe.partial = True
    assert invocation(stopped)["executionSuccessful"] is False
    blind = invocation(report(gate(0, "a"), unclassified=("x.y",)))
    assert blind["executionSuccessful"] is True
    assert "inconclusive" in blind["toolExecutionNotifications"][0]["message"]["text"]
    failed = invocation(seed(), unaudited=UNAUDITED)
    assert failed["executionSuccessful"] is False
    assert [n["level"] for n in failed["toolExecutionNotifications"]] == ["error", "note"]
    alone = validators.sarif(
        FORMATS["sarif"].render_many([], setting=dataclasses.replace(SETTING, unaudited=UNAUDITED))
    )
    assert alone["runs"][0]["invocations"][0]["executionSuccessful"] is False


def test_more_than_25000_results_lose_the_mildest_and_say_so() -> None:
    made = many(30_000)
    for finding in made.findings[-3_000:]:  # errors
        finding.suppressed = "baseline"
    (run,) = log(made)["runs"]
    levels = [(r["level"], "suppressions" in r) for r in run["results"]]
    assert levels.count(("error", False)) == 7_000
    assert levels.count(("warning", False)) == 10_000
    assert levels.count(("note", False)) == 8_000
    assert len(levels) == 25_000
    warnings = [r["properties"]["components"][0] for r in run["results"] if r["level"] == "warning"]
    assert warnings == sorted(warnings)  # the report's order
    assert "5,000 findings left out" in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]


def test_more_than_20_models_share_the_last_run() -> None:
    made = [seed() for _ in range(23)]
    for i, one in enumerate(made):
        one.model.path = f"step{i}.pt"
    runs = log(*made)["runs"]
    assert [run["automationDetails"]["id"] for run in runs] == [
        *(f"emscan/step{i}.pt/" for i in range(19)),
        "emscan/models/",
    ]
    assert sum(len(run["results"]) for run in runs) == 23 * len(seed().findings)
    assert {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in runs[-1]["results"]} == {
        f"step{i}.pt" for i in range(19, 23)
    }


def test_a_file_that_would_be_too_large_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 20_000)
    made = many(2_000)
    noise = random.Random(0)
    for finding in made.findings:
        finding.message = "".join(noise.choices("abcdefghijklmnopqrstuvwxyz", k=200))
    text = FORMATS["sarif"].render(made, setting=SETTING)
    assert len(gzip.compress(text.encode())) <= 20_000
    (run,) = validators.sarif(text)["runs"]
    assert 0 < len(run["results"]) < 2_000
    assert {r["level"] for r in run["results"]} == {"error"}
    assert "left out" in json.dumps(run["invocations"])


def test_messages_that_look_like_links_and_placeholders_are_text() -> None:
    made = report(gate(0, "a"))
    made.findings = [
        Finding("EM101", "error", "layer [x](javascript:1) {0} {12} {a} [3]"),
        Finding("EM101", "error", "[3] a]"),
    ]
    first, second = (r["message"]["text"] for r in results(made))
    assert first == "layer \\[x\\](javascript:1) {{0}} {{12}} {a} \\[3\\]"
    assert second == "[3] a]"
