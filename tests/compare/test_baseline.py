"""What a baseline knows: only what is new or worse counts."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest

from emscan import rules
from emscan.compare.baseline import baseline_text, read_baseline
from emscan.errors import ReportError
from emscan.report.document import Limit, Misfit, Mismatch, PolicyInfo, Report
from tests.report.builder import gate, report, softmax


def written(folder: Path, *reports: Report, name: str = "baseline.json") -> Path:
    path = folder / name
    path.write_text(baseline_text(reports, folder))
    return path


def counted(made: Report) -> set[tuple[str, str | None]]:
    return {(f.rule, f.layer) for f in made.findings if f.suppressed is None}


def applied(tmp_path: Path, old: Report, new: Report, **options) -> tuple[set[tuple[str, str | None]], list[str]]:
    notes: list[str] = []
    baseline = read_baseline(written(tmp_path, old), ["model.pt"], note=notes.append, **options)
    baseline.apply(new)
    return counted(new), notes + baseline.stale()


def test_what_was_there_before_is_suppressed(tmp_path: Path) -> None:
    rest, notes = applied(tmp_path, report(gate(0, "a", dead=[1, 5])), report(gate(0, "a", dead=[1, 5])))
    assert not rest
    assert not notes


def test_fewer_components_are_no_worse(tmp_path: Path) -> None:
    new = report(gate(0, "a", dead=[5]))
    assert not applied(tmp_path, report(gate(0, "a", dead=[1, 5])), new)[0]
    assert [f.suppressed for f in new.findings] == ["baseline"]


@pytest.mark.parametrize("dead", [[1, 5, 6], [1, 6], [6]])
def test_an_index_that_is_new_is_worse_even_where_the_count_is_not(tmp_path: Path, dead: list[int]) -> None:
    rest, _ = applied(tmp_path, report(gate(0, "a", dead=[1, 5])), report(gate(0, "a", dead=dead)))
    assert rest == {("EM101", "a")}


def test_a_finding_in_another_layer_or_of_another_rule_is_new(tmp_path: Path) -> None:
    old = report(gate(0, "a", dead=[1]), gate(1, "b"))
    rest, _ = applied(tmp_path, old, report(gate(0, "a", dead=[1], rare=[3]), gate(1, "b", dead=[1])))
    assert rest == {("EM107", "a"), ("EM101", "b")}


def test_of_two_alike_rows_each_is_compared_with_its_own(tmp_path: Path) -> None:
    """The fingerprint numbers the findings: with the first one fixed, the second would stand where it was."""
    old = report(gate(0, "a", dead=[1, 5]), gate(1, "a", dead=[3]))
    assert not applied(tmp_path, old, report(gate(0, "a"), gate(1, "a", dead=[3])))[0]
    assert applied(tmp_path, old, report(gate(0, "a", dead=[3]), gate(1, "a", dead=[3])))[0] == {("EM101", "a")}


def limited(value: float, information: float) -> Report:
    made = report(softmax(0, "head"))
    made.layers[0].responsibility.information = information
    made.policy = PolicyInfo(limits=[Limit("min-information", value)])
    rules.apply(made)
    assert [f.rule for f in made.findings if f.rule == "EM503"] == ["EM503"]
    return made


@pytest.mark.parametrize(("now", "known"), [(0.5, True), (0.6, True), (0.499, True), (0.4, False)])
def test_a_limit_is_worse_where_its_number_is_further_off(tmp_path: Path, now: float, known: bool) -> None:
    rest, _ = applied(tmp_path, limited(1.0, 0.5), limited(1.0, now))
    assert (("EM503", "head") not in rest) is known


def test_the_tolerance_is_a_setting(tmp_path: Path) -> None:
    assert not applied(tmp_path, limited(1.0, 0.5), limited(1.0, 0.4), tolerance=0.1)[0]


def test_a_sum_over_the_model_is_worse_where_it_grew(tmp_path: Path) -> None:
    def made(*dead: int) -> Report:
        found = report(gate(0, "a", dead=list(dead)), gate(1, "b", dead=[0]))
        found.policy = PolicyInfo(limits=[Limit("max-dead-model", 1)])
        rules.apply(found)
        return found

    assert ("EM501", None) in applied(tmp_path, made(1), made(1, 2))[0]
    assert ("EM501", None) not in applied(tmp_path, made(1, 2), made(1))[0]
    assert not applied(tmp_path, made(1, 2), made(1, 2))[0]


def test_statistics_of_rules_without_components(tmp_path: Path) -> None:
    def made(violation: float) -> Report:
        row = softmax(0, "router", kind="experts")
        row.mechanism, row.verdict = "truncation", "hard"
        row.components.kind = "experts"
        row.responsibility.max_violation = violation
        found = report(row)
        assert any(f.rule == "EM202" for f in found.findings)
        return found

    assert ("EM202", "router") in applied(tmp_path, made(4.0), made(5.0))[0]
    assert ("EM202", "router") not in applied(tmp_path, made(4.0), made(4.03))[0]


def test_evidence_that_fails_by_far_more_is_worse(tmp_path: Path) -> None:
    def made(error: float) -> Report:
        row = softmax(0, "head")
        row.evidence.sum_error = error
        return report(row)

    assert not applied(tmp_path, made(0.1), made(0.15))[0]
    assert applied(tmp_path, made(0.1), made(0.4))[0] == {("EM401", "head")}


def test_more_tensors_that_are_missing_are_worse(tmp_path: Path) -> None:
    def made(missing: int) -> Report:
        found = report(gate(0, "a"))
        found.model.partial = Misfit(3, ["x"] * missing, [], [Mismatch("y", [1], [2])])
        rules.apply(found)
        return found

    assert not applied(tmp_path, made(2), made(2))[0]
    assert applied(tmp_path, made(2), made(3))[0] == {("EM905", None)}


def test_what_a_policy_ignores_keeps_its_reason(tmp_path: Path) -> None:
    new = report(gate(0, "a", dead=[1]))
    new.findings[0].suppressed = "ignore: EM101"
    applied(tmp_path, report(gate(0, "a", dead=[1])), new)
    assert new.findings[0].suppressed == "ignore: EM101"


def test_why_a_finding_is_worse_can_be_asked(tmp_path: Path) -> None:
    new = report(gate(0, "a", dead=[1, 6, 7], rare=[2]))
    baseline = read_baseline(written(tmp_path, report(gate(0, "a", dead=[1]))), ["model.pt"])
    baseline.apply(new)
    reasons = {finding.rule: baseline.reason(finding) for finding in new.findings}
    assert reasons == {"EM101": "not in the baseline: 6, 7", "EM107": None}
    now = limited(1.0, 0.4)
    baseline = read_baseline(written(tmp_path, limited(1.0, 0.5)), ["model.pt"])
    baseline.apply(now)
    (limit,) = [finding for finding in now.findings if finding.rule == "EM503"]
    assert baseline.reason(limit) == "information 0.5 -> 0.4 since the baseline"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": 99}, "model.pt ran on 99 samples, the baseline on 100"),
        ({"sha256": "b" * 64}, "model.pt ran on another probe than the baseline (their sha256 differ)"),
        ({"synthetic": True}, "model.pt ran on a synthetic probe, the baseline on a probe of data"),
        ({"objective": "bce"}, "model.pt was audited with objective bce, the baseline with none"),
    ],
)
def test_another_run_is_said(tmp_path: Path, change: dict, said: str) -> None:
    old = report(gate(0, "a"))
    old.probe.sha256 = "a" * 64
    new = copy.deepcopy(old)
    new.probe = dataclasses.replace(new.probe, **change)
    assert applied(tmp_path, old, new)[1] == [f"{said}; findings may differ for that reason"]


def test_another_synthetic_seed_and_other_thresholds_are_said(tmp_path: Path) -> None:
    old = report(gate(0, "a"), synthetic=True)
    new = copy.deepcopy(old)
    new.probe.seed = 3
    new.thresholds = dataclasses.replace(new.thresholds, rare=0.05)
    first, second = applied(tmp_path, old, new)[1]
    assert first.startswith("model.pt ran on a synthetic probe of seed 3, the baseline on one of seed 0")
    assert second.startswith("other thresholds: rare 0.05 (was 0.01)")


def test_another_schema_version_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, report(gate(0, "a")))
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 7'))
    with pytest.raises(ReportError, match="schema_version is 7, this emscan reads 1"):
        read_baseline(path)


def test_a_missing_file_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no baseline .*gone.json: no such file; write it with --update-baseline"):
        read_baseline(tmp_path / "gone.json")


def several(folder: Path) -> tuple[Report, Report]:
    found = report(gate(0, "a", dead=[1])), report(gate(0, "a", dead=[2]))
    for name, one in zip(("one.pt", "two.pt"), found, strict=True):
        one.model.path = str(folder / "models" / name)
    return found


def test_several_models_each_meet_their_own_report_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    one, two = several(tmp_path)
    path = written(tmp_path, one, two)
    assert [made["model"]["path"] for made in json.loads(path.read_text())] == ["models/one.pt", "models/two.pt"]
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    one.model.path, two.model.path = "one.pt", "../models/two.pt"
    baseline = read_baseline(os.path.relpath(path), ["one.pt", "../models/two.pt"])
    for made in (one, two):
        baseline.apply(made)
        assert not counted(made)
    two.findings[0].suppressed, two.model.path = None, "one.pt"
    baseline.apply(two)
    assert counted(two) == {("EM101", "a")}


def test_a_model_that_is_not_in_it_is_all_new_and_what_was_not_checked_is_said(tmp_path: Path) -> None:
    one, two = several(tmp_path)
    notes: list[str] = []
    baseline = read_baseline(written(tmp_path, one, two), ["x", "y"], note=notes.append)
    other = report(gate(0, "a", dead=[1]))
    baseline.apply(other)
    assert counted(other) == {("EM101", "a")}
    assert notes == ["model.pt: not in the baseline, so every finding is new"]
    assert [sentence.partition(": ")[2] for sentence in baseline.stale()] == [
        "models/one.pt was not checked",
        "models/two.pt was not checked",
    ]


def test_one_model_meets_the_one_report_whatever_their_names(tmp_path: Path) -> None:
    new = report(gate(0, "a", dead=[1]))
    new.model.path = "step=900.ckpt"
    read_baseline(written(tmp_path, report(gate(0, "a", dead=[1]))), ["step=900.ckpt"]).apply(new)
    assert not counted(new)


def test_fixed_findings_are_counted(tmp_path: Path) -> None:
    _, notes = applied(tmp_path, report(gate(0, "a", dead=[1], rare=[2])), report(gate(0, "a", rare=[2])))
    assert len(notes) == 1
    assert notes[0].endswith("1 finding is gone from model.pt; --update-baseline takes them out")


def test_two_reports_of_one_model_are_an_error(tmp_path: Path) -> None:
    one, _ = several(tmp_path)
    first, second = written(tmp_path, one), written(tmp_path, one, name="again.json")
    with pytest.raises(ReportError, match=r"two reports of models/one.pt"):
        read_baseline([first, second])
