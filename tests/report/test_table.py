"""The table: what it shows, and that it fits."""

from __future__ import annotations

import html.parser
import re

import pytest

from emscan import rules
from emscan.report.document import WeightsOnly
from emscan.report.table import render_html, render_text
from tests.report.builder import gate, plain, report, seed, softmax

SEED_AT_80 = """\
model.pt: torch-module, 1,234 parameters

 Layer                             EM structure  Mechanism   K  Dead  Spread
 ───────────────────────────────────────────────────────────────────────────
 Linear + ReLU                     No            threshold   2   2/8  on 25%
   0  dead: 1, 5
 Linear + ReLU                     No            threshold   2   0/8  on 25%
   2
 Linear + ReLU                     No            threshold   2   0/8  on 25%
   4  rare: 3
 Linear + Softmax + Cross-Entropy  Yes           softmax    10  0/10  H 0.43
   6

1 layer without competition not shown: 1 affine (--all shows them)
"""


def test_snapshot_at_80_columns() -> None:
    assert render_text(seed(), 80).startswith(SEED_AT_80)


def test_closing_line_says_how_far_dead_goes() -> None:
    text = " ".join(render_text(seed(), 80).split())
    assert "1 of 4 competitions and gates has EM structure." in text
    assert "2 of 34 components are dead on this probe of 100 samples." in text
    assert "fires in at most 2.95% of samples (95% bound)" in text  # 1 - 0.05^(1/100)


@pytest.mark.parametrize("width", [60, 72, 80, 100, 110, 120, 200])
@pytest.mark.parametrize("all_layers", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, all_layers: bool) -> None:
    long = "model.encoder.layers.11.self_attention.projections.query_key_value"
    made = report(
        gate(0, long, count=4096, dead=list(range(0, 4096, 3))), softmax(1, long, count=128256), plain(2, long)
    )
    text = render_text(made, width, all_layers=all_layers)
    assert max(map(len, text.splitlines())) <= width
    assert "1366/4096" in text
    assert "128256" in text


@pytest.mark.parametrize("width", [20, 24, 30, 36, 40, 50, 60, 66, 72, 80, 96, 110, 120, 160])
@pytest.mark.parametrize(
    "composition", ["Linear + ReLU", "Conv2d + BatchNorm2d + ReLU + MaxPool2d + Dropout + Residual + X"]
)
def test_no_number_is_ever_cut(width: int, composition: str) -> None:
    """A cut index is a wrong index: someone would prune that row."""
    long = "model.encoder.layers.self_attention.projections.query_key_value"
    dead = list(range(10_000, 40_960, 1_111))
    one, other = gate(0, long, count=40_960, dead=dead), softmax(1, long, count=128_256)
    one.composition = other.composition = composition
    one.leaky = True
    other.mechanism = "logistic"
    other.components.starved = [100_000, 123_456]
    text = render_text(report(one, other), width)
    assert max(map(len, text.splitlines())) <= width
    assert f"{len(dead)}/40960" in text
    assert "0/128256" in text
    for layer_line in text.split("\n\n")[1].splitlines():
        whole = {*map(str, dead), "40960", "128256", "100000", "123456", str(len(dead))}
        assert set(re.findall(r"\d{3,}", layer_line)) <= whole


def test_at_60_columns_the_seeds_table_is_still_there() -> None:
    rows = re.findall(r"^ (Linear \+ .+?)  +(Yes|No) ", render_text(seed(), 60), re.MULTILINE)
    assert rows == [("Linear + ReLU", "No")] * 3 + [("Linear + Softmax + Cross-Entropy", "Yes")]
    assert "on 25%" in render_text(seed(), 60)


def test_long_lists_are_cut_in_the_table_and_never_in_the_document() -> None:
    made = report(gate(0, "fc", count=4096, dead=list(range(1000))))
    assert "+996" in render_text(made, 120)
    assert len(made.to_dict()["layers"][0]["components"]["dead"]) == 1000


def test_layers_without_competition_are_counted_or_shown() -> None:
    assert "extra" not in render_text(seed(), 100)
    assert "extra" in render_text(seed(), 100, all_layers=True)
    assert "not shown" not in render_text(seed(), 100, all_layers=True)


def test_a_synthetic_probe_is_flagged() -> None:
    text = render_text(seed(synthetic=True), 100)
    assert "SYNTHETIC PROBE" in text
    assert "indicative" in text
    assert "EM903" in text


def test_an_inconclusive_audit_says_why() -> None:
    assert "not classified: custom.op" in render_text(report(gate(0, "a"), unclassified=("custom.op",)), 100)
    assert "inconclusive" in render_text(report(), 100)
    weights = report()
    weights.weights = WeightsOnly(1, 4, {"float32": 1}, command="emscan audit x.pt --model file.py:callable")
    rules.apply(weights)
    assert "To do: name the architecture: emscan audit x.pt --model file.py:callable" in render_text(weights, 100)


def test_markup_in_names_is_text() -> None:
    made = report(gate(0, "[bold]<script>x</script>", dead=[1]))
    assert "[bold]<script>x</script>" in render_text(made, 140)
    page = render_html(made)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_html_is_well_formed() -> None:
    class Balanced(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    page = Balanced()
    page.feed(seed()._repr_html_())
    assert not page.open


def test_str_of_a_report_is_the_table() -> None:
    assert "Linear + Softmax + Cross-Entropy" in str(seed())


def test_a_name_cannot_steer_the_terminal() -> None:
    made = report(gate(0, "a\x1b[2Jb\nc :fire: \u202edeb \udc80", dead=[1]))
    made.model.path = "\x1b]0;title\x07.pt"
    for text in (render_text(made, 80), render_text(made, 200), render_html(made)):
        assert not {"\x1b", "\x07", "\u202e", "\udc80"} & set(text)
        assert "a\\x1b[2Jb\\nc :fire:" in text


def test_a_share_that_is_not_zero_does_not_read_as_zero() -> None:
    row = gate(0, "a")
    row.components.on_rate = [0.0001] * 8
    assert "on <0.1%" in render_text(report(row), 80)


def test_findings_are_capped_and_counted() -> None:
    made = report(*(gate(i, f"fc{i}", dead=[1]) for i in range(15)))
    assert "... and 3 more findings (--format json lists all)" in render_text(made, 80)
    assert "... and 3 more findings" in render_html(made)


def test_long_attention_says_how_much_was_measured() -> None:
    rows = [softmax(i, f"layers.{i}", kind="keys") for i in range(2)]
    assert "queries measured" not in render_text(report(*rows))
    for row in rows:
        assert row.responsibility is not None
        row.responsibility.sampled, row.responsibility.competitions = 3072, 98_304
    said = "Long attention (2 rows): 6,144 of 196,608 queries measured, evenly spaced."
    assert said in render_text(report(*rows))
