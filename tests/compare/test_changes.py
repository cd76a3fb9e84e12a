"""What a comparison of two reports says, and how it is written."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest

from emscan import rules
from emscan.compare.changes import compare, moved
from emscan.compare.gate import KINDS, condition
from emscan.compare.schema import comparison_schema
from emscan.compare.table import render_markdown, render_text
from emscan.compare.words import pair, ranges
from emscan.errors import UsageError
from emscan.report.document import Head, Limit, PolicyInfo, Report
from tests.report.builder import gate, plain, report, seed, softmax


def changed(old: Report, **of_head) -> Report:
    """A copy in which fields of the last row's responsibility are others."""
    new = copy.deepcopy(old)
    for name, value in of_head.items():
        setattr(new.layers[-1].responsibility, name, value)
    rules.apply(new)
    return new


def test_a_report_equals_itself() -> None:
    found = compare(seed(), seed())
    assert found.same_probe
    assert [found.layers, found.removed, found.added, found.findings] == [[], [], [], []]
    assert found.summary.rows == 5
    assert "0 of 5 rows changed. Findings: none new, worse or fixed." in render_text(found)


def test_deaths_and_revivals_are_told_by_index() -> None:
    found = compare(report(gate(0, "a", dead=[1, 5], rare=[3])), report(gate(0, "a", dead=[3, 5, 6], rare=[])))
    dead, rare = found.layers[0].lists
    assert (dead.name, dead.old, dead.new, dead.entered, dead.left) == ("dead", 2, 3, [3, 6], [1])
    assert (rare.name, rare.entered, rare.left) == ("rare", [], [3])
    assert (found.summary.died, found.summary.revived) == (2, 1)
    text = render_text(found)
    assert "  died: 3, 6 (dead 2 -> 3 of 8)\n  revived: 1\n  no longer rare: 3 (rare 1 -> 0 of 8)" in text


def test_comparing_the_other_way_round_swaps_the_two() -> None:
    one, two = report(gate(0, "a", dead=[1, 5])), report(gate(0, "a", dead=[5, 6]), plain(1, "x"))
    there, back = compare(one, two).summary, compare(two, one)
    assert (there.died, there.revived) == (back.summary.revived, back.summary.died)
    assert [row.name for row in back.removed] == ["x"]


def test_another_composition_under_the_same_name_is_a_change_of_verdict() -> None:
    new = gate(0, "a")
    new.composition, new.verdict, new.mechanism = "Linear + SiLU", "em", "logistic"
    found = compare(report(gate(0, "a"), gate(1, "b")), report(new, gate(1, "b")))
    assert len(found.layers) == found.summary.verdicts == 1
    change = found.layers[0].verdict
    assert (change.old, change.new, change.old_mechanism, change.new_mechanism) == (
        "hard",
        "em",
        "threshold",
        "logistic",
    )
    assert "was Linear + ReLU\n  verdict hard (threshold) -> em (logistic)" in render_text(found)


def test_a_renamed_row_is_one_that_went_and_one_that_came() -> None:
    found = compare(report(gate(0, "a"), gate(1, "b")), report(gate(0, "a"), gate(1, "c", dead=[2])))
    assert [row.name for row in found.removed] == ["b"]
    assert [(row.name, row.dead) for row in found.added] == [("c", [2])]
    assert not found.layers
    assert "c  Linear + ReLU: only in the new report, 1 of 8 dead" in render_text(found)


def test_rows_that_share_name_and_composition_match_in_order() -> None:
    found = compare(
        report(gate(0, "a", dead=[1]), gate(1, "a", dead=[2])),
        report(gate(0, "a", dead=[1]), gate(1, "a", dead=[2, 4])),
    )  # fmt: skip
    assert [(change.index, change.lists[0].entered) for change in found.layers] == [(1, [4])]


def test_indices_of_a_resized_row_are_not_compared() -> None:
    found = compare(report(gate(0, "a", count=8, dead=[1])), report(gate(0, "a", count=16, dead=[1, 9, 12])))
    dead = found.layers[0].list_change("dead")
    assert (dead.entered, dead.left) == (None, None)
    assert found.summary.died == 2
    assert found.notes[1:] == ["1 row has another number of components: their indices are not compared"]
    assert "dead 1 of 8 -> 3 of 16" in render_text(found)


def test_load_shift_is_the_total_variation_distance() -> None:
    old = report(softmax(0, "head", count=4))
    new = copy.deepcopy(old)
    new.layers[0].components.load = [0.1, 0.4, 0.3, 0.2]
    new.layers[0].components.starved = [2]
    found = compare(old, new)
    shift = found.layers[0].loads[0]
    assert shift.total_variation == pytest.approx(0.2)
    assert shift.index in {0, 1}
    assert (shift.old, shift.new) == (0.25, new.layers[0].components.load[shift.index])
    assert found.summary.starved == 1
    assert "load shift 0.2 (total variation; most class " in render_text(found)


def test_information_lost_and_entropy() -> None:
    old = report(gate(0, "a"), softmax(1, "head"))
    found = compare(old, changed(old, information=0.5, normalized_entropy=0.5))
    (change,) = found.layers
    assert change.information_lost == pytest.approx(0.3)
    assert "normalized entropy 0.43 -> 0.5, information 0.8 -> 0.5 nats" in render_text(found)
    assert compare(changed(old, information=0.5), old).layers[0].information_lost is None


def test_numbers_within_the_tolerance_are_not_listed() -> None:
    old = report(softmax(0, "head"))
    assert not compare(old, changed(old, information=0.8 * 1.0009)).layers
    assert compare(old, changed(old, information=0.8 * 1.0011)).layers
    assert compare(old, changed(old, information=0.8 * 1.0009), tolerance=0).layers
    assert not compare(old, changed(old, information=0.9), tolerance=0.2).layers
    assert not moved(0.0, 1e-7, 1e-3)
    assert moved(None, 1.0, 1e-3)


def test_evidence_is_told_where_it_no_longer_holds() -> None:
    old = report(softmax(0, "head"))
    new = copy.deepcopy(old)
    new.layers[0].evidence.sum_error = 9e-6  # rounding, within 1e-5
    assert not compare(old, new).layers
    new.layers[0].evidence.sum_error = 0.5
    rules.apply(new)
    found = compare(old, new)
    assert (found.layers[0].evidence.old_state, found.layers[0].evidence.new_state) == ("holds", "fails")
    assert "evidence holds -> fails, off by 0.5, tolerance 1e-05" in render_text(found)
    assert [(c.change, c.finding.rule) for c in found.findings] == [("new", "EM401")]
    new.layers[0].evidence = copy.deepcopy(old.layers[0].evidence)
    new.layers[0].evidence.differentiable = False
    assert "posterior differentiable -> not differentiable" in render_text(compare(old, new))


def test_heads_are_compared_one_by_one() -> None:
    old = report(softmax(0, "attention"))
    old.layers[0].responsibility.heads = [Head(0.5), Head(0.6), Head(0.7)]
    new = copy.deepcopy(old)
    new.layers[0].responsibility.heads = [Head(0.5), Head(0.1), Head(0.69)]
    found = compare(old, new)
    assert [(head.head, head.old, head.new) for head in found.layers[0].heads] == [(1, 0.6, 0.1), (2, 0.7, 0.69)]
    assert "normalized entropy of 2 heads, most head 1: 0.6 -> 0.1" in render_text(found)


def test_findings_new_worse_and_fixed() -> None:
    old = report(gate(0, "a", dead=[1]), gate(1, "b", rare=[2]), gate(2, "c", dead=[0]))
    new = report(gate(0, "a", dead=[1, 2]), gate(1, "b"), gate(2, "c", dead=[0], dormant=[3]))
    found = compare(old, new)
    assert {(c.change, c.finding.rule, c.finding.layer) for c in found.findings} == {
        ("worse", "EM101", "a"), ("new", "EM108", "c"), ("fixed", "EM107", "b"),
    }  # fmt: skip
    assert next(c.components for c in found.findings if c.change == "worse") == [2]


def test_suppressed_findings_do_not_count() -> None:
    new = report(gate(0, "a", dead=[1]))
    new.findings[0].suppressed = "ignore: EM101"
    found = compare(report(gate(0, "a")), new)
    assert found.summary.new_findings == 0
    assert condition("warning").judge(found).met
    assert "1 suppressed finding changed; it does not count" in render_text(found)


def test_limits_of_a_policy_that_judged_one_side_alone_are_left_out() -> None:
    new = report(gate(0, "a", dead=[1]))
    new.policy = PolicyInfo(limits=[Limit("max-dead", 0)])
    rules.apply(new)
    found = compare(report(gate(0, "a", dead=[1])), new)
    assert not found.findings
    assert found.notes[1:] == ["only one of the two was judged by a policy: findings of EM5xx are left out"]


def gated(text: str, found=None) -> tuple[float, bool]:
    old = report(gate(0, "a", dead=[1]), softmax(1, "head"))
    new = changed(report(gate(0, "a", dead=[2, 3]), softmax(1, "head")), information=0.6, effective_components=7.5)
    one = condition(text).judge(found or compare(old, new))
    return one.value, one.met


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("died", 2, False), ("died=1", 2, False), ("died=2", 2, True), ("died=11%", 2, False), ("died=12%", 2, True),
        ("revived", 1, False), ("starved", 0, True), ("verdict", 0, True), ("removed", 0, True), ("added", 0, True),
        ("information", 0.2, False), ("information=0.19", 0.2, False), ("information=0.21", 0.2, True),
        ("information=24%", 0.2, False), ("information=26%", 0.2, True), ("effective=2", 2.0, True),
        ("effective=20%", 2.0, False), ("new-findings", 0, True), ("worse-findings", 1, False), ("warning", 1, False),
        ("error", 0, True), ("EM101", 1, False), ("EM101=1", 1, True), ("dead-unit", 1, False), ("EM2", 0, True),
        ("load", 0, True), ("evidence", 0, True), ("probe", 0, True),
    ],
)  # fmt: skip
def test_gates(text: str, value: float, met: bool) -> None:
    found, ok = gated(text)
    assert found == pytest.approx(value)
    assert ok is met


def test_a_gate_on_verdicts_rows_and_the_probe() -> None:
    new = gate(0, "a")
    new.composition, new.verdict = "Linear + Tanh", "em"
    other = report(new, gate(1, "c"), samples=7)
    found = compare(report(gate(0, "a"), gate(1, "b")), other)
    for kind in ("verdict", "removed", "added", "probe"):
        assert gated(kind, found) == (1, False)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("dead", "did you mean"), ("dyed", "did you mean died?"), ("warn", "did you mean warning?"),
        ("EM1O1", "no rule 'EM1O1'; did you mean EM"), ("died=", "is no limit; write a number or a share"),
        ("died=x", "is no limit"), ("died=-1", "is no limit"), ("died=101%", "is no limit"),
        ("added=5%", "is no limit; write a number"), ("died=nan", "is no limit"), ("died=inf", "is no limit"),
    ],
)  # fmt: skip
def test_a_wrong_gate_says_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        condition(text)
    assert f"--fail-on {text}: " in str(error.value)
    assert hint in str(error.value)


def big() -> Report:
    return report(*(gate(i, f"layers.{i}.fc", count=400, dead=list(range(0, 400, 2))) for i in range(50)))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_keeps_its_width_and_says_what_it_cuts(width: int) -> None:
    old = report(*(gate(i, f"layers.{i}.fc", count=400) for i in range(50)))
    text = render_text(compare(old, big()), width)
    assert max(map(len, text.splitlines())) <= width + len(" ... (--all)")
    assert "... and 30 more rows changed (--all shows them)" in text
    assert "10000 died" in text.replace(",", "")
    whole = render_text(compare(old, big()), width, everything=True)
    assert "layers.49.fc" in whole
    assert "398" in whole
    assert "--all" not in whole


def test_names_cannot_steer_the_terminal_or_become_markup() -> None:
    old, new = report(gate(0, "a\x1b[31m|`x`<b>")), report(gate(0, "a\x1b[31m|`x`<b>", dead=[1]))
    assert "\x1b" not in render_text(compare(old, new))
    markdown = render_markdown(compare(old, new))
    assert "\x1b" not in markdown
    assert "``a\\x1b[31m\\|`x`<b>``" in markdown


def test_documents_fit_the_schema() -> None:
    old = report(gate(0, "a", dead=[1]), softmax(1, "head"), gate(2, "b"))
    new = changed(report(gate(0, "a", dead=[2]), gate(2, "c"), softmax(1, "head")), information=0.1, heads=[Head(0.1)])
    new.layers[-1].components.load = [0.0] * 9 + [1.0]
    new.layers[-1].evidence.sum_error = 1.0
    rules.apply(new)
    found = compare(old, new)
    found.gates = [condition(kind).judge(found) for kind in (*KINDS, "EM101=3")]
    validator = jsonschema.Draft202012Validator(comparison_schema())
    validator.check_schema(comparison_schema())
    validator.validate(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    validator.validate(compare(seed(), seed(synthetic=True)).to_dict())


def test_words() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7, 8"
    assert ranges([]) == ""
    assert pair(0.12345, 0.12346) == "0.12345 -> 0.12346"
    assert pair(None, 0.5, " nats") == "none -> 0.5 nats"
    assert pair(123456, 3) == "123456 -> 3"
