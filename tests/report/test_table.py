"""The table: what it shows, and that it fits."""

from __future__ import annotations

import html.parser

import pytest

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
