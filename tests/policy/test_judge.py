"""What counts by a policy: limits, suppression with its reason, outcomes, what of a policy did nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emscan import rules
from emscan.cli.status import worst
from emscan.policy import Judgement, Policy, judge, read_policy, stale
from emscan.policy.selectors import counts
from emscan.report.document import Report
from emscan.report.formats import FORMATS
from emscan.report.read import parse_reports
from tests.report.builder import gate, plain, report, seed, softmax


def policy(text: str = "", tmp: Path | None = None, **options: Any) -> Policy:
    chosen = {name.replace("_", "-"): value for name, value in options.items()}
    if tmp is None:
        return read_policy(search=False, options=chosen)
    (tmp / "emscan.toml").write_text(text)
    return read_policy(tmp / "emscan.toml", options=chosen)


def counted(judged: Judgement) -> list[str]:
    return [finding.rule for finding in judged.counted]


def test_without_limits_warnings_count_and_notes_do_not() -> None:
    judged = judge(seed(), policy())
    assert judged.outcome == "findings"
    assert counted(judged) == ["EM101"]
    assert any(finding.level == "note" and finding.suppressed is None for finding in judged.report.findings)
    assert judge(report(gate(0, "a", rare=[1])), policy()).outcome == "clean"
    assert judge(report(gate(0, "a", rare=[1])), policy(fail_on=["note"])).outcome == "findings"


def test_a_limit_decides_in_place_of_the_rule_that_says_the_same() -> None:
    within = judge(report(gate(0, "a", dead=[1, 2])), policy(max_dead="25%"))
    assert within.outcome == "clean"
    assert [f.suppressed for f in within.report.findings] == ["limit: max-dead = 25% decides"]
    beyond = judge(report(gate(0, "a", dead=[1, 2])), policy(max_dead="24%"))
    assert counted(beyond) == ["EM501"]
    found = beyond.counted[0]
    assert (found.level, found.components) == ("error", [1, 2])
    assert found.message == "layer a: 2 of 8 units are dead, 25%; max-dead allows 24% (1, 2)"
    assert beyond.report.summary.findings == 1


def test_provably_dead_units_are_dead_once() -> None:
    row = gate(0, "a", dead=[1, 2], provably_dead=[2, 3])
    assert judge(report(row), policy(max_dead="3")).outcome == "clean"
    assert judge(report(row), policy(max_dead="2")).counted[0].components == [1, 2, 3]


def test_a_limit_counts_whatever_fail_on_and_select_say() -> None:
    judged = judge(report(gate(0, "a", dead=[1])), policy(max_dead="0", fail_on=["EM301"], select=["EM2"]))
    assert counted(judged) == ["EM501"]
    assert [finding.rule for finding in judged.report.findings] == ["EM501"]  # the rest is not selected


def test_limits_of_the_whole_model() -> None:
    made = report(gate(0, "a", dead=[1, 2]), gate(1, "b", dead=[0]), gate(2, "c"))
    assert judge(made, policy(max_dead_model="13%", fail_on=["error"])).outcome == "clean"
    found = judge(made, policy(max_dead_model="2", fail_on=["error"])).counted
    assert [f.message for f in found] == [
        "model: 3 of 24 components are dead, 12.5%; max-dead-model allows 2 (2 in a, 1 in b)"
    ]


def test_information_is_in_nats_or_a_share_of_ln_k() -> None:
    made = report(softmax(0, "a"))  # 0.8 nats of ln 10
    assert judge(made, policy(min_information="0.8")).outcome == "clean"
    assert judge(made, policy(min_information="0.81")).counted[0].message == (
        "layer a: information is 0.8 nats; min-information asks for 0.81"
    )
    share = 100 * 0.8 / math.log(10)
    assert judge(made, policy(min_information=f"{share - 0.01:.6f}%")).outcome == "clean"
    assert judge(made, policy(min_information=f"{share + 0.01:.6f}%")).outcome == "findings"


def test_the_last_limit_for_a_row_holds(tmp_path: Path) -> None:
    text = (
        'max-dead = 0\n[[layer]]\npattern = "enc.*"\nmax-dead = "50%"\n[[layer]]\npattern = "enc.1"\nmax-dead = "off"\n'
        '[[layer]]\npattern = "dec"\nignore = ["max-dead"]\n'
    )
    made = report(gate(0, "enc.0", dead=[1]), gate(1, "enc.1", dead=[1, 2, 3, 4, 5]), gate(2, "dec", dead=[3]))
    judged = judge(made, policy(text, tmp_path))
    reasons = {(f.rule, f.layer): f.suppressed for f in judged.report.findings}
    assert reasons[("EM101", "enc.0")] == "limit: max-dead = 50% decides"
    assert reasons[("EM101", "enc.1")] is None  # off: no limit decides
    assert reasons[("EM501", "dec")].startswith("ignore: EM501 in dec (")
    assert counted(judged) == ["EM101"]


def test_names_of_layers_with_brackets_match_themselves(tmp_path: Path) -> None:
    judged = judge(
        report(gate(0, "a[0]", dead=[1])), policy('[[layer]]\npattern = "a[0]"\nignore = ["EM101"]\n', tmp_path)
    )
    assert judged.outcome == "suppressed"


def test_outcomes_are_told_apart() -> None:
    dead, odd = gate(0, "a", dead=[1]), ("custom.op",)
    assert judge(report(gate(0, "a")), policy()).outcome == "clean"
    assert judge(report(dead), policy(ignore=["EM101"])).outcome == "suppressed"
    assert judge(report(gate(0, "a", rare=[1])), policy(ignore=["EM107"])).outcome == "clean"  # it never counted
    assert judge(report(gate(0, "a"), unclassified=odd), policy()).outcome == "inconclusive"
    assert judge(report(dead, unclassified=odd), policy()).outcome == "findings"
    assert judge(report(dead, unclassified=odd), policy(ignore=["EM101"])).outcome == "inconclusive"
    assert judge(report(gate(0, "a"), unclassified=odd), policy(select=["EM1"])).outcome == "inconclusive"
    assert judge(report(gate(0, "a"), unclassified=odd), policy(ignore=["EM901"])).outcome == "suppressed"
    assert judge(report(), policy()).outcome == "inconclusive"


class _Seen:
    """A baseline in which dead units of one layer are known."""

    def apply(self, made: Report) -> None:
        for finding in made.findings:
            if finding.layer == "a" and finding.suppressed is None:
                finding.suppressed = "baseline"


def test_what_a_baseline_knows_does_not_count() -> None:
    made = report(gate(0, "a", dead=[1]), gate(1, "b", dead=[1]))
    judged = judge(made, policy(), _Seen())
    assert [(f.rule, f.layer) for f in judged.counted] == [("EM101", "b")]
    assert judge(report(gate(0, "a", dead=[1])), policy(), _Seen()).outcome == "suppressed"


def test_judging_twice_gives_the_same() -> None:
    made, chosen = seed(), policy(max_dead="5%", ignore=["EM107"])
    first = judge(made, chosen).report.to_dict()
    assert judge(made, chosen).report.to_dict() == first


def test_the_report_says_what_it_was_judged_by() -> None:
    made = judge(seed(), policy(max_dead="5%", ignore=["EM107"])).report
    again = parse_reports(FORMATS["json"].render(made).encode(), "x")[0]
    assert again == made
    assert again.policy is not None
    assert (again.policy.ignore, again.policy.limits[0].name) == (["EM107"], "max-dead")


def test_what_matched_nothing_is_said_once_for_all_models(tmp_path: Path) -> None:
    text = (
        'ignore = ["EM402", "EM101"]\n[[layer]]\npattern = "0"\nignore = ["EM106"]\n'
        '[[layer]]\npattern = "zz*"\nignore = ["EM1"]\n[[checkpoint]]\npath = "other.pt"\nseed = 1\n'
    )
    chosen = policy(text, tmp_path)
    where = (tmp_path / "emscan.toml").as_posix()
    judged = [judge(seed(), chosen), judge(report(gate(0, "b")), chosen)]
    assert stale(chosen, judged) == [
        f"{where}:8: no model matches other.pt",
        f"{where}:5: no layer matches zz*",
        f"{where}:1: ignore EM402 matches no finding",
        f"{where}:4: ignore EM106 in 0 matches no finding",
    ]
    assert not stale(chosen, [*judged, Judgement("c.pt", "failed")])  # it could be the one


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ((), 0),
        (("clean", "suppressed", "skipped"), 0),
        (("clean", "inconclusive"), 3),
        (("inconclusive", "findings"), 1),
        (("findings", "failed", "inconclusive"), 2),
    ],
)
def test_the_exit_status(outcomes: tuple[Any, ...], status: int) -> None:
    assert worst(outcomes) == status


@given(dead=st.sets(st.integers(0, 99)), percent=st.integers(0, 100))
def test_a_share_is_kept_exactly_when_the_count_is_within_it(dead: set[int], percent: int) -> None:
    made = report(gate(0, "a", count=100, dead=sorted(dead)), plain(1, "b"))
    judged = judge(made, policy(max_dead=f"{percent}%"))
    assert (judged.outcome == "clean") == (len(dead) <= percent)


def test_nothing_suppressed_counts() -> None:
    made = seed()
    for finding in made.findings:
        finding.suppressed = "baseline"
    assert not any(counts(finding, ["note"]) for finding in made.findings)
    assert rules.summarize(made).findings == 0
