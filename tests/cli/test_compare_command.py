"""`emscan compare`: exit statuses, reports and checkpoints, what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emscan.compare.baseline import baseline_text
from emscan.report.document import Report
from tests.cli.inprocess import Emscan, Ran, emscan
from tests.compare.runs import PROBE, oracle, revive, train
from tests.report.builder import gate, report, softmax

__all__ = ["emscan"]  # the fixture


def errors(ran: Ran) -> list[str]:
    """The lines of stderr that are no notes."""
    return [line for line in ran.err.splitlines() if "note:" not in line]


def saved(path: Path, *reports: Report) -> Path:
    path.write_text(baseline_text(reports, Path()))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    old = report(gate(0, "a", dead=[1, 5]), softmax(1, "head"))
    new = report(gate(0, "a", dead=[5, 6, 7]), softmax(1, "head"))
    old.model.path, new.model.path = "old.pt", "new.pt"
    return saved(tmp_path / "old.json", old), saved(tmp_path / "new.json", new)


def test_two_reports(two, emscan: Emscan) -> None:
    ran = emscan("compare", *two, COLUMNS="80")
    assert (ran.status, ran.err) == (0, "")
    assert "  died: 6, 7 (dead 2 -> 3 of 8)\n  revived: 1\n" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_json_is_the_document(two, emscan: Emscan) -> None:
    found = json.loads(emscan("compare", *two, "--format", "json", "--fail-on", "died=2").out)
    assert found["schema_version"] == 1
    assert found["layers"][0]["lists"][0] == {"name": "dead", "old": 2, "new": 3, "entered": [6, 7], "left": [1]}
    assert found["gates"] == [
        {"kind": "died", "limit": 2.0, "share": False, "value": 2, "met": True, "where": None}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fail_on", "status"),
    [
        ([], 0), (["died"], 1), (["died=2"], 0), (["verdict"], 0), (["verdict", "revived"], 1), (["new-findings"], 0),
        (["EM101"], 1), (["worse-findings"], 1), (["error"], 0),
    ],
)  # fmt: skip
def test_the_gate_sets_the_status(two, emscan: Emscan, fail_on: list[str], status: int) -> None:
    ran = emscan("compare", *two, *(part for kind in fail_on for part in ("--fail-on", kind)))
    assert ran.status == status
    assert ("FAILED" in ran.out) is (status == 1)


def test_inconclusive_is_3_and_the_gate_comes_first(two, tmp_path: Path, emscan: Emscan) -> None:
    blind = saved(tmp_path / "blind.json", report(gate(0, "a", dead=[1]), unclassified=("x.y",)))
    assert emscan("compare", two[0], blind).status == 3
    assert emscan("compare", two[0], blind, "--fail-on", "revived").status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{old}", "gone.json"], "gone.json"),
        (["{old}", "{old}", "--fail-on", "dyed"], "--fail-on dyed: no such kind; did you mean died?"),
        (["{old}", "{old}", "--format", "sarif"], "--format sarif: no such choice; use one of table, json, markdown"),
        (["{old}", "{old}", "--tolerance", "2"], "--tolerance 2 is no share; give a number from 0 to 1"),
        (["-", "-"], "stdin can be one of the two; give a file for the other"),
        (["{old}", "{many}"], "holds 2 reports, one is needed; give a file with a single report"),
        (["{old}", "{bad}"], "is no report: "),
    ],
)
def test_what_is_wrong_is_one_line(two, tmp_path: Path, emscan: Emscan, arguments: list[str], message: str) -> None:
    names = {"old": two[0], "many": tmp_path / "many.json", "bad": tmp_path / "bad.json"}
    (tmp_path / "many.json").write_text(f"[{two[0].read_text()}, {two[1].read_text()}]")
    (tmp_path / "bad.json").write_text('{"schema_version": 1}')
    ran = emscan("compare", *(part.format(**names) for part in arguments))
    assert (ran.status, ran.out) == (2, "")
    (line,) = errors(ran)
    assert line.startswith("emscan: error: ")
    assert message in line


def test_output_goes_to_a_file_and_never_over_a_source(two, tmp_path: Path, emscan: Emscan) -> None:
    ran = emscan("compare", *two, "--output", tmp_path / "out.md", "--format", "markdown")
    assert (ran.status, ran.out) == (0, "")
    assert (tmp_path / "out.md").read_text().startswith("### emscan: `old.pt` -> `new.pt`\n")
    assert emscan("compare", *two, "--output", two[1]).status == 2


def test_options_of_an_audit_do_nothing_for_reports_and_it_says_so(two, emscan: Emscan) -> None:
    assert "--probe: without effect, these are reports" in emscan("compare", *two, "--probe", "x.npy").err


def test_checkpoints_are_audited_and_a_revived_unit_is_found(tmp_path: Path, emscan: Emscan) -> None:
    *_, last = train(tmp_path)
    dead = oracle(last)["0"]["dead"]
    revive(last, tmp_path / "fixed.ckpt", dead[2])
    ran = emscan("compare", last, tmp_path / "fixed.ckpt", "--probe", PROBE, "--format", "json")
    assert (ran.status, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["same_probe"]
    change = next(one for one in found["layers"] if one["name"] == "0")
    assert next(one for one in change["lists"] if one["name"] == "dead")["left"] == [dead[2]]
    assert found["summary"]["revived"] >= 1
    kept = tmp_path / "last.json"
    assert emscan("audit", last, "--probe", PROBE, "--format", "json", "--output", kept).status == 0
    mixed = emscan("compare", kept, tmp_path / "fixed.ckpt", "--probe", PROBE, "--format", "json")
    assert json.loads(mixed.out)["layers"] == found["layers"]
    without = emscan("compare", kept, tmp_path / "fixed.ckpt", "--fail-on", "probe")
    assert without.status == 1
    assert f"is of the probe {PROBE}; without --probe" in without.err
    assert "the new one ran on a synthetic probe, the old report on a probe of data" in " ".join(without.out.split())


def test_comparing_reports_does_not_import_torch(two) -> None:
    code = (
        "import sys\nfrom emscan.cli import main\n"
        f"sys.argv = ['emscan', 'compare', {str(two[0])!r}, {str(two[1])!r}]\n"
        "try:\n    main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_schemas_are_printed(emscan: Emscan) -> None:
    from emscan.compare.schema import comparison_schema, trend_schema

    assert json.loads(emscan("schema", "compare").out) == comparison_schema()
    assert json.loads(emscan("schema", "trend").out) == trend_schema()
