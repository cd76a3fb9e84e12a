"""Every rule fires on what it describes and stays silent otherwise."""

from __future__ import annotations

import math

import pytest

from emscan import rules
from emscan.report.document import (
    Calibration,
    Evidence,
    Head,
    Limit,
    Misfit,
    NotFinite,
    PolicyInfo,
    Report,
    Thresholds,
    WeightsOnly,
)
from emscan.rules.registry import rule
from tests.report.builder import gate, plain, report, seed, softmax


def routed():
    row = softmax(0, "router", count=8, kind="experts")
    row.verdict, row.mechanism, row.em_compatible = "hard", "truncation", False
    row.components.kind, row.components.count = "experts", 8
    return row


def with_(row, **changes):
    for path, value in changes.items():
        holder = row
        *parents, last = path.split("__")
        for name in parents:
            holder = getattr(holder, name)
        setattr(holder, last, value)
    return row


def attending(**numbers):
    """A row with a sound head and one that differs from it by ``numbers``."""
    sound = {
        "normalized_entropy": 0.6,
        "first_key": 0.05,
        "hard_fraction": 0.1,
        "output_norm": 1.0,
        "uniform_first_key": 0.1,
    }
    heads = [Head(**sound), Head(**{**sound, **numbers})]
    return with_(softmax(0, "a", kind="keys"), components=None, responsibility__heads=heads)


def weights_only(made: Report) -> Report:
    """Tensors without an architecture, one of which holds a NaN."""
    made.weights = WeightsOnly(1, 4, {"float32": 1}, not_finite=[NotFinite("w", 1, 0)])
    rules.apply(made)
    return made


def half_loaded(made: Report) -> Report:
    """An audit with --partial: a tensor was missing."""
    made.model.partial = Misfit(3, ["w"])
    rules.apply(made)
    return made


def partial(made: Report) -> Report:
    made.probe.partial = True
    rules.apply(made)
    return made


def limited(row, name: str, value: float, *, share: bool = False) -> Report:
    """A report that a policy with one limit was applied to."""
    made = report(row)
    made.policy = PolicyInfo(limits=[Limit(name, value, share)])
    rules.apply(made)
    return made


FIRES: dict[str, Report] = {
    "EM001": report(with_(softmax(0, "a"), alternatives__kind="batch")),
    "EM002": report(with_(softmax(0, "a"), flags=["double-normalization"])),
    "EM003": report(with_(softmax(0, "a"), flags=["unlogged"])),
    "EM101": report(gate(0, "a", dead=[1])),
    "EM102": report(gate(0, "a", count=3, dead=[0, 1, 2])),
    "EM103": report(with_(gate(0, "a", dead=[1]), components__numeric=True)),
    "EM104": report(gate(0, "a", provably_dead=[2])),
    "EM105": report(with_(routed(), components__dead=[3])),
    "EM106": report(with_(softmax(0, "a"), components__starved=[3])),
    "EM107": report(gate(0, "a", rare=[2])),
    "EM108": report(gate(0, "a", dormant=[2])),
    "EM201": report(with_(softmax(0, "a"), responsibility__information=1e-6, components__variance=[1e-4] * 10)),
    "EM202": report(with_(routed(), responsibility__max_violation=1.5)),
    "EM203": report(with_(gate(0, "a", frozen=[1]), mechanism="logistic", verdict="em")),
    "EM204": report(
        with_(softmax(0, "a", kind="prototypes"), responsibility__hard_fraction=0.999, responsibility__heads=None)
    ),
    "EM205": report(with_(softmax(0, "a"), components__redundancy=0.1, components__copies=[[1, 4]])),
    "EM206": report(with_(routed(), responsibility__dropped=0.1)),
    "EM207": report(attending(normalized_entropy=0.04)),
    "EM208": report(attending(first_key=0.4)),
    "EM209": report(attending(normalized_entropy=0.995)),
    "EM210": report(attending(output_norm=0.04)),
    "EM211": report(with_(softmax(0, "a"), responsibility__calibration=Calibration(1000, 0.6, 0.9, 0.3))),
    "EM301": report(with_(gate(0, "a"), flags=["non-finite"])),
    "EM302": weights_only(report()),
    "EM401": report(with_(softmax(0, "a"), evidence=Evidence("x", None, 0.1, 1e-9, 1e-5, "float32", True))),
    "EM402": report(with_(softmax(0, "a"), flags=["detached"])),
    "EM501": limited(gate(0, "a", dead=[1, 2]), "max-dead", 0.2, share=True),
    "EM502": limited(with_(softmax(0, "a"), components__starved=[3]), "max-starved", 0),
    "EM503": limited(softmax(0, "a"), "min-information", 0.9),
    "EM504": limited(with_(routed(), responsibility__max_violation=0.8), "max-violation", 0.5),
    "EM505": limited(softmax(0, "a"), "min-entropy", 0.5, share=True),
    "EM506": limited(softmax(0, "a"), "min-effective-components", 0.96, share=True),
    "EM507": limited(gate(0, "a", dormant=[2]), "max-dormant", 0),
    "EM508": limited(gate(0, "a", rare=[2]), "max-rare", 0),
    "EM509": limited(with_(gate(0, "a", frozen=[1]), mechanism="logistic", verdict="em"), "max-frozen", 0),
    "EM510": limited(with_(softmax(0, "a"), responsibility__saturated=0.4), "max-saturated", 0.3),
    "EM511": limited(softmax(0, "a"), "max-hard-fraction", 0.05),
    "EM512": limited(with_(softmax(0, "a"), components__redundancy=0.3), "max-redundancy", 0.2),
    "EM513": limited(with_(routed(), responsibility__dropped=0.1), "max-dropped", 0.05, share=True),
    "EM514": limited(
        with_(softmax(0, "a"), responsibility__calibration=Calibration(1000, 0.9, 0.9, 0.05)),
        "max-calibration-error",
        0.02,
    ),
    "EM901": report(gate(0, "a"), unclassified=("custom.op",)),
    "EM902": report(),
    "EM903": report(plain(0, "a"), synthetic=True),
    "EM904": partial(report(plain(0, "a"))),
    "EM905": half_loaded(report(plain(0, "a"))),
}


def codes(made: Report) -> set[str]:
    return {finding.rule for finding in made.findings}


def test_every_rule_is_covered() -> None:
    assert set(FIRES) == set(rules.RULES)


@pytest.mark.parametrize("code", sorted(FIRES))
def test_fires(code: str) -> None:
    found = [finding for finding in FIRES[code].findings if finding.rule == code]
    assert len(found) == 1
    assert found[0].message
    assert "\n" not in found[0].message
    assert found[0].fingerprint.startswith(f"v1:{code}:")


@pytest.mark.parametrize("code", sorted(FIRES))
def test_stays_silent_on_a_sound_network(code: str) -> None:
    assert code not in codes(report(gate(0, "a"), softmax(1, "b"), plain(2, "c")))


@pytest.mark.parametrize("code", sorted(rules.RULES))
def test_pages_explain(code: str) -> None:
    page = rules.RULES[code].page
    for part in ("What it finds:", "Why it matters:", "What to do:"):
        assert part in page
    assert "replace the activation" not in page.lower()


def test_a_code_is_registered_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        rule("EM101", "again", "note")(lambda report: iter(()))


def test_fingerprints_do_not_depend_on_numbers() -> None:
    one, other = report(gate(0, "a", dead=[1])), report(gate(0, "a", dead=[2, 3]), samples=7)
    assert one.findings[0].fingerprint == other.findings[0].fingerprint
    assert report(gate(0, "b", dead=[1])).findings[0].fingerprint != one.findings[0].fingerprint


def test_findings_come_worst_first_and_twice_the_same() -> None:
    made = report(gate(0, "a", rare=[1]), gate(1, "b", dead=[1]), with_(gate(2, "c"), flags=["non-finite"]))
    levels = [rules.LEVELS.index(finding.level) for finding in made.findings]
    assert levels == sorted(levels)
    before = list(made.findings)
    rules.apply(made)
    assert made.findings == before


def test_collapse_says_why_the_load_does_not_show_it() -> None:
    finding = next(f for f in FIRES["EM201"].findings if f.rule == "EM201")
    assert "varies by less than 0.01" in finding.message
    assert "the load looks fine" in finding.message


def test_dead_on_a_synthetic_probe_is_indicative() -> None:
    assert any("indicative" in f.message for f in seed(synthetic=True).findings if f.rule == "EM101")


@pytest.mark.parametrize(
    ("made", "status"),
    [(seed(), "ok"), (report(), "inconclusive"), (report(gate(0, "a"), unclassified=("x.y",)), "inconclusive")],
)
def test_status(made: Report, status: str) -> None:
    assert made.summary.status == status


def finding(made: Report, code: str):
    return next(f for f in made.findings if f.rule == code)


def test_a_posterior_that_is_the_same_for_every_input_is_not_said_to_look_fine() -> None:
    """Everything on one component: information is 0 and the load is far from even."""
    row = with_(softmax(0, "a"), responsibility__information=0.0, responsibility__effective_components=1.2)
    found = finding(report(row), "EM201")
    assert "looks fine" not in found.message
    assert "every input gets the same components: 1.2 effective of 10" in found.message


@pytest.mark.parametrize(
    "changes",
    [{"alternatives__kind": "prior"}, {"responsibility__competitions": 1}, {"alternatives__persistent": False}],
)
def test_information_that_is_zero_by_construction_is_no_finding(changes) -> None:
    assert "EM201" not in codes(report(with_(softmax(0, "a"), responsibility__information=0.0, **changes)))


@pytest.mark.parametrize("errors", [(math.nan, 1e-9), (1e-9, math.nan), (math.inf, None), (None, 1.0)])
def test_evidence_that_is_no_number_fails(errors) -> None:
    made = report(with_(softmax(0, "a"), evidence=Evidence("x", None, *errors, 1e-5, "float32", True)))
    assert finding(made, "EM401").level == "error"


def test_fingerprints_tell_findings_of_one_report_apart() -> None:
    """Two gates on one layer, two unknown operators."""
    made = report(gate(0, "fc", dead=[1]), gate(1, "fc", dead=[2]), unclassified=("a.one", "a.two"))
    prints = [f.fingerprint for f in made.findings]
    assert len(set(prints)) == len(prints) == 4
    alone = report(gate(0, "fc", dead=[3]), unclassified=("a.two",))
    assert {f.fingerprint for f in alone.findings} < set(prints)


def test_a_saturated_layer_without_a_frozen_unit() -> None:
    row = with_(softmax(0, "a"), mechanism="logistic", responsibility__saturated=0.995)
    assert "99.5% of values" in finding(report(row), "EM203").message


def test_messages_name_the_threshold_in_force() -> None:
    hard = {"responsibility__hard_fraction": 0.999, "responsibility__heads": None}
    made = report(with_(softmax(0, "a", kind="prototypes"), **hard))
    made.thresholds = Thresholds(hard=0.9)
    rules.apply(made)
    assert finding(made, "EM204").message.endswith("0.9 or more")


@pytest.mark.parametrize("name", ["rare", "dormant", "starved"])
def test_lists_on_a_synthetic_probe_are_indicative(name: str) -> None:
    made = report(gate(0, "a", **{name: [1]}), synthetic=True)
    assert any("indicative" in f.message for f in made.findings if f.layer == "a")


def test_heads_are_named_with_their_numbers() -> None:
    said = finding(report(attending(first_key=0.4)), "EM208")
    assert said.components == [1]
    assert said.message == "layer a: 1 of 2 heads rest on the first key (1; mean mass 0.4)"


def test_a_short_causal_sequence_has_no_sink() -> None:
    """Uniform attention over 1, 2, ..., 8 keys gives the first one 0.34 on average."""
    made = report(attending(first_key=0.34, uniform_first_key=0.34), attending(output_norm=0.06))
    assert not codes(made) & {"EM208", "EM210"}


def test_folded_layers_count_their_heads() -> None:
    from emscan.report.fold import Line
    from emscan.report.notices import notices
    from emscan.report.select import view

    rows = [with_(attending(first_key=0.4 + i / 50), index=i, name=f"layers.{i}.attention") for i in range(21)]
    made = report(*rows)
    lines: list[Line] = view(made)
    assert [len(line.members) for line in lines] == [21]
    (said,) = [n for n in notices(made, lines) if n.rule == "EM208"]
    assert "in all 21, 21 of 42 heads" in said.text


def test_two_opposite_alternatives_are_one_decision_and_not_redundant() -> None:
    full = {"components__redundancy": 1.0, "components__redundancy_centred": 0.98, "components__copies": []}
    assert "EM205" not in codes(report(with_(softmax(0, "a", count=2), **full)))
    said = finding(report(with_(softmax(0, "a", count=10), **full)), "EM205").message
    assert said == (
        "layer a: squared correlations of the 10 classes reach 100% of what they could be (98% without what all scores "
        "share); the load does not show it"
    )
    for name in ("redundancy", "redundancy_centred"):
        assert "EM205" not in codes(report(with_(softmax(0, "a"), **{**full, f"components__{name}": 0.74})))
    assert "EM205" not in codes(report(with_(routed(), **full)))  # only rows in which all alternatives keep a share
