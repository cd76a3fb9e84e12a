"""Folding: every row in one line, honest ranges, sums that stay, and a table that fits a screen."""

from __future__ import annotations

import json
import re
import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emscan import rules
from emscan.report import indices
from emscan.report.document import Report, Unclassified
from emscan.report.fold import MANY, Line, fold, lines
from emscan.report.formats import FORMATS
from emscan.report.notices import notices
from emscan.report.phrases import calls, dead, spread
from emscan.report.select import view
from emscan.report.table import render_html, render_text
from tests.report.builder import gate, plain, report, softmax


def attention(index: int, name: str, entropy: float = 0.5):
    row = softmax(index, name, count=12, kind="keys")
    row.composition, row.statistic, row.components = "Attention", "mean", None
    row.responsibility.normalized_entropy = entropy
    return row


def decoder(blocks: int = 40, **dead_units: list[int]) -> Report:
    """Attention and a gated layer per block; ``dead_units``: per block ("b7") the dead units."""
    rows = []
    for block in range(blocks):
        rows.append(attention(len(rows), f"model.layers.{block}.self_attn", 0.5 + block / 1000))
        found = dead_units.get(f"b{block}", [])
        rows.append(gate(len(rows), f"model.layers.{block}.mlp.fc1", count=96, dead=found))
        rows.append(plain(len(rows), f"model.layers.{block}.mlp.fc2"))
    return report(*rows, softmax(len(rows), "head"))


FOLDED_AT_80 = """\
model.pt: torch-module, 1,234 parameters

 Layer                             EM   Mechanism   K    Dead  Spread
 ──────────────────────────────────────────────────────────────────────────
 Attention                         Yes  softmax    12       -  H 0.50..0.54
   model.layers.0 to layers.39 .self_attn (40 rows)
 Linear + ReLU                     No   threshold   2  4/3840  on 25%
   model.layers.0 to layers.39 .mlp.fc1 (40 rows)
     dead in 2 of 40, worst layers.31: 3/96
 Linear + Softmax + Cross-Entropy  Yes  softmax    10    0/10  H 0.43
   head

80 rows that differ only by index share 2 lines (--all, --layer show each)
40 layers without competition not shown: 40 affine (--all shows them)
EM101 warning layers model.layers.0 to layers.39 .mlp.fc1: in 2 of 40, 4 of 3840
              units; worst layers.31: 3 of 96 units are dead on this probe of
              100 samples (4, 8, 15)
"""


def test_snapshot_of_forty_blocks_at_80_columns() -> None:
    assert render_text(decoder(b7=[3], b31=[4, 8, 15]), 80).startswith(FOLDED_AT_80)


def test_a_table_of_few_rows_is_not_folded() -> None:
    rows = [gate(i, f"layers.{i}") for i in range(MANY)]
    assert [line.members for line in lines(rows)] == [(row,) for row in rows]
    assert "share" not in render_text(report(*rows), 80)
    assert len(lines([*rows, gate(MANY, f"layers.{MANY}")])) == 1


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("every", [[], [3]])
def test_126_layers_fit_a_screen(width: int, every: list[int]) -> None:
    text = render_text(decoder(126, **{f"b{i}": every for i in range(126)}), width)
    assert len(text.splitlines()) <= 40
    assert "model.layers.0 to layers.125 .self_attn" in text


def _labels(names: list[str]) -> list[str]:
    return [line.label for line in fold([gate(i, name) for i, name in enumerate(names)])]


def test_layers_that_are_modules_of_a_list() -> None:
    assert _labels([f"layers.{i}" for i in range(126)]) == ["layers.0 to layers.125"]


def test_an_alternating_pattern_is_two_lines_with_a_step() -> None:
    rows = [attention(i, f"layers.{i}.attn") for i in range(62)]
    for row in rows[1::2]:
        row.alternatives.count = 512
    found = fold(rows)
    assert [line.label for line in found] == [
        "layers.0 to layers.60 (every 2nd) .attn",
        "layers.1 to layers.61 (every 2nd) .attn",
    ]
    assert [len(line.members) for line in found] == [31, 31]


def test_every_sixth_layer_is_global() -> None:
    rows = [attention(i, f"layers.{i}.attn") for i in range(62)]
    for row in rows[5::6]:
        row.alternatives.count = 512
    assert [line.label for line in fold(rows)] == [
        "layers.0 to layers.61 (all but 5 to 59, every 6th) .attn",
        "layers.5 to layers.59 (every 6th) .attn",
    ]


def test_dense_blocks_then_experts() -> None:
    names = [f"model.layers.{i}.mlp.gate_proj" for i in range(3)]
    names += [f"model.layers.{i}.mlp.experts.{e}.gate_proj" for i in range(3, 61) for e in range(8)]
    assert _labels(names) == [
        "model.layers.0 to layers.2 .mlp.gate_proj",
        "model.layers.3 to layers.60 .mlp.experts.0 to experts.7 .gate_proj",
    ]


def test_stages_of_different_depth_stay_apart() -> None:
    names = [f"stages.{s}.blocks.{b}.conv" for s, depth in enumerate((3, 4, 6, 3)) for b in range(depth)]
    assert _labels(names) == [
        "stages.0, 3 .blocks.0 to blocks.2 .conv",
        "stages.1.blocks.0 to blocks.3 .conv",
        "stages.2.blocks.0 to blocks.5 .conv",
    ]


def test_an_irregular_group_says_how_many_of_the_range_it_holds() -> None:
    """Which experts a probe reaches is no pattern; a line per layer would not fit."""
    names = [f"layers.{i}.experts.{e}.act" for i in range(20) for e in range(8) if (i * i + 3 * e * i + e) % 11 > 3]
    (label,) = _labels(names)
    assert label == f"layers.0 to layers.19 .experts.0 to experts.7 .act ({len(names)} of 160)"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([4], "4"),
        ([4, 5], "4, 5"),
        ([0, 1, 2], "0 to x.2"),
        ([0, 2, 4], "0, 2, 4"),
        ([0, 2, 4, 6], "0 to x.6 (every 2nd)"),
        ([3, 14, 25, 36], "3 to x.36 (every 11th)"),
        ([0, 21, 42, 63], "0 to x.63 (every 21st)"),
        ([0, 1, 2, 9], "0, 1, 2, 9"),
        ([0, 1, 2, 4, 5], "0 to x.5 (all but 3)"),
        ([0, 1, 3, 9, 70], "0 to x.70 (5 of 71)"),
        ([0, 1, 3, 9, 10**8], "0 to x.100000000 (5 of 100000001)"),
    ],
)
def test_indices_in_words(values: list[int], words: str) -> None:
    assert indices.span(values, "x.") == words


def test_rows_that_are_not_the_same_thing_stay_apart() -> None:
    base = [gate(i, f"layers.{i}.act") for i in range(6)]
    base[1].composition = "Linear + ReLU6"
    base[2].leaky = True
    base[3].statistic = "mode"
    base[4].alternatives.count = 3
    assert [len(line.members) for line in fold(base)] == [2, 1, 1, 1, 1]


def test_what_is_set_off_by_an_underscore_is_an_index_only_where_it_must_be() -> None:
    few = [f"layers.{i}.expert_{e}.act" for i in range(9) for e in range(3)]
    assert len(_labels(few)) == 3
    many = [f"layers.{i}.expert_{e}.act" for i in range(9) for e in range(30)]
    assert _labels(many) == ["layers.0 to layers.8 .expert_0 to expert_29 .act"]
    glued = [f"block{b}.dense{d}.act" for b in range(3) for d in range(1, 30)]
    assert _labels(glued) == ["block0 to block2 .dense1 to dense29 .act"]


def test_two_rows_of_one_name_are_two_lines() -> None:
    names = [f"layers.{i}.fc" for i in range(30) for _ in range(2)]
    assert _labels(names) == ["layers.0 to layers.29 .fc"] * 2


def test_numbers_that_are_no_indices() -> None:
    names = [f"layer_{i:02}.fc" for i in range(30)] + ["a." + "9" * 5000, "b.²"]
    assert sum(line.label.startswith("layer_10 to layer_29") for line in fold([gate(0, n) for n in names])) == 1


def test_calls_and_ranges_of_a_line() -> None:
    rows = [gate(i, f"layers.{i}.act") for i in range(4)]
    assert calls(Line((rows[0],), "a")) == ""
    assert calls(fold(rows)[0]) == " (4 rows)"
    for row in rows:
        row.calls = 3
    assert calls(fold(rows)[0]) == " (4 rows, x3 each)"
    rows[0].calls = 1
    assert calls(fold(rows)[0]) == " (4 rows, x10 in all)"
    rows[0].components.on_rate = [0.0001] * 8
    rows[1].components = None
    assert spread(fold(rows)[0]) == "on <0.1%..25%"
    assert dead(fold(rows)[0]) == "0/24"


def test_findings_of_a_line_are_one_and_all_stay_in_the_document() -> None:
    made = decoder(b7=[3], b31=[4, 8, 15])
    assert [f.rule for f in made.findings] == ["EM101", "EM101"]
    assert len(made.to_dict()["findings"]) == 2
    (said,) = notices(made, view(made))
    assert said.count == 2
    assert said.text.startswith(
        "layers model.layers.0 to layers.39 .mlp.fc1: in 2 of 40, 4 of 3840 units; worst layers.31"
    )
    assert [n.count for n in notices(made, view(made, all_layers=True))] == [1, 1]


def test_the_worst_is_judged_by_what_the_rule_goes_by() -> None:
    rows = [softmax(i, f"layers.{i}.gate", count=8, kind="experts") for i in range(30)]
    for i, row in enumerate(rows):
        row.responsibility.max_violation = 1.5 + (i * 7 % 30) / 10
    (said,) = notices(made := report(*rows), view(made))
    assert "in all 30; worst layers.17: the busiest expert gets 5.4 times" in said.text
    for row in rows:
        row.responsibility.max_violation = 1.5
    (said,) = notices(made := report(*rows), view(made))
    assert "in all 30; e.g. layers.0: the busiest expert gets 2.5 times" in said.text


def test_one_finding_in_a_line_names_its_layer() -> None:
    made = decoder(b7=[3])
    text = " ".join(render_text(made, 80).split())
    assert "EM101 warning layer model.layers.7.mlp.fc1: 1 of 96 units are dead" in text
    assert "dead in layers.7: 3" in text


def test_unclassified_operators_of_repeated_blocks_are_one_line() -> None:
    made = decoder()
    made = report(*made.layers, unclassified=("odd.op",))
    made.coverage.unclassified = [Unclassified("odd.op", f"layers.{i}.x", 1) for i in range(40)]
    rules.apply(made)
    (said,) = notices(made, view(made))
    assert said.text == "odd.op in layers.0 to layers.39 .x: not classified (40 calls in 40 places)"
    assert said.count == 40


def test_the_page_for_notebooks_is_folded_too() -> None:
    page = render_html(decoder(b7=[3], b31=[4, 8, 15]))
    assert page.count("<tr>") == 4
    assert "model.layers.0 to layers.39 .mlp.fc1 (40 rows)" in page
    assert "worst layers.31: 3/96" in page


def test_all_unfolds() -> None:
    text = render_text(decoder(), 80, all_layers=True)
    assert all(f"model.layers.{i}.mlp.{fc}" in text for i in range(40) for fc in ("fc1", "fc2"))
    assert "share" not in text


# Properties

_WORD = st.sampled_from(["layers", "experts", "act", "0", "1", "2", "7", "12", "h_1", "h_2", "conv3", ""])
_NAME = st.lists(_WORD, min_size=1, max_size=4).map(".".join)
_GRID = st.builds(
    lambda blocks, experts, keep: [
        f"m.layers.{b}.experts.{e}.act" for b in range(blocks) for e in range(experts) if keep[(b * experts + e) % 11]
    ],
    st.integers(1, 9),
    st.integers(1, 5),
    st.lists(st.booleans(), min_size=11, max_size=11),
)
_NAMES = st.one_of(
    st.lists(_NAME, max_size=40), _GRID, st.builds(lambda a, b: a + b, _GRID, st.lists(_NAME, max_size=9))
)


@st.composite
def _rows(draw):
    rows = []
    for index, name in enumerate(draw(_NAMES)):
        make = draw(st.sampled_from([gate, attention]))
        row = make(index, name)
        row.calls = draw(st.integers(1, 3))
        if row.components is not None:
            row.components.dead = sorted(draw(st.sets(st.integers(0, 7), max_size=3)))
        rows.append(row)
    return rows


@given(_rows())
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_exactly_one_line(rows) -> None:
    found = fold(rows)
    assert sorted(row.index for line in found for row in line.members) == list(range(len(rows)))
    assert all(len(line.tags) == len(line.members) == len(set(line.tags)) for line in found)
    firsts = [line.first.index for line in found]
    assert firsts == sorted(firsts)
    assert all(list(line.members) == sorted(line.members, key=lambda row: row.index) for line in found)


@given(_rows())
@settings(max_examples=100, deadline=None)
def test_sums_stay(rows) -> None:
    shown = [dead(line) for line in fold(rows)]
    pairs = [tuple(map(int, cell.split("/"))) for cell in shown if cell != "-"]
    parts = [row.components for row in rows if row.components is not None]
    assert sum(d for d, _ in pairs) == sum(len(p.dead) for p in parts)
    assert sum(n for _, n in pairs) == sum(p.count for p in parts)
    made = report(*rows)
    assert sum(n.count for n in notices(made, fold(made.layers))) == len(made.findings)


@given(st.sets(st.sampled_from(["stem", "body", "neck", "head", "a.b", "a.c", "layers.0.act"]), max_size=7))
def test_a_report_without_repeats_is_left_as_it_is(names) -> None:
    rows = [gate(i, name) for i, name in enumerate(sorted(names))]
    assert [(line.label, line.members) for line in fold(rows)] == [(row.name, (row,)) for row in rows]


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 2)), min_size=1))
def test_boxes_hold_every_point_once(points) -> None:
    held = [point for box in indices.boxes(points) for point in product(*box)]
    assert len(held) == len(points)
    assert set(held) == points


@given(st.sets(st.integers(0, 40), min_size=1))
def test_a_range_says_exactly_which_indices_it_means(values) -> None:
    """Read back as a user would, but for "n of m", which says only how many."""
    chosen = sorted(values)
    text = indices.span(chosen)
    counted = re.search(r"\((\d+) of (\d+)\)", text)
    if counted:
        assert (int(counted[1]), int(counted[2])) == (len(chosen), chosen[-1] - chosen[0] + 1)
    else:
        assert _read(text) == chosen


def _read(text: str) -> list[int]:
    plain, _, rest = text.partition(" (")
    rest = rest.rstrip(")")
    if " to " not in plain:
        return [int(part) for part in plain.split(", ")]
    first, last = map(int, plain.split(" to "))
    step = re.fullmatch(r"every (\d+)\w\w", rest)
    if step:
        return list(range(first, last + 1, int(step[1])))
    holes = _read(re.sub(r", (every .*)", r" (\1)", rest.removeprefix("all but "))) if rest else []
    return [i for i in range(first, last + 1) if i not in holes]


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 96, 110, 120, 160])
def test_a_folded_table_fits_and_cuts_no_number(width: int) -> None:
    made = decoder(126, **{f"b{i}": list(range(0, 90, 7)) for i in range(100, 120)})
    text = render_text(made, width)
    assert max(map(len, text.splitlines())) <= width
    assert "260/12096" in text


def test_a_name_that_is_elided_keeps_its_indices_whole() -> None:
    name = "model.vision_tower.encoder.layers.31.self_attention.projections.query_key_value_output.dense"
    for width in (40, 60, 80):
        shown = render_text(report(attention(0, name)), width).splitlines()[5].strip().partition("  ")[0]
        assert len(shown) <= width - 3
        assert set(shown.split(".")) <= {"…", *name.split(".")}
        assert shown.startswith("model.")
        assert shown.endswith(".dense")


def test_thousands_of_experts_fold_in_no_time() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.gate_proj" for i in range(60) for e in range(256)]
    start = time.perf_counter()
    assert len(_labels(names)) == 1
    assert time.perf_counter() - start < 5


def structure_only(blocks: int = 126) -> Report:
    """What an audit without weights gives: verdicts, and null where a statistic would be."""
    made = decoder(blocks)
    for row in made.layers:
        row.components = row.responsibility = row.evidence = None
    made = report(*made.layers, synthetic=True)
    made.model.weights = False
    return made


STRUCTURE_AT_80 = """\
model.pt: torch-module, 1,234 parameters
structure only: no weights, so no statistics

 Layer                             EM structure  Mechanism   K
 ─────────────────────────────────────────────────────────────
 Attention                         Yes           softmax    12
   model.layers.0 to layers.125 .self_attn (126 rows)
 Linear + ReLU                     No            threshold   2
   model.layers.0 to layers.125 .mlp.fc1 (126 rows)
 Linear + Softmax + Cross-Entropy  Yes           softmax    10
   head

252 rows that differ only by index share 2 lines (--all, --layer show each)
126 layers without competition not shown: 126 affine (--all shows them)
"""


def test_a_report_without_weights_says_so_and_shows_no_statistic() -> None:
    text = render_text(structure_only(), 80)
    assert text.startswith(STRUCTURE_AT_80)
    assert text.endswith("127 of 253 competitions and gates have EM structure.")
    assert "SYNTHETIC PROBE" not in text
    page = render_html(structure_only())
    assert "structure only: no weights" in page
    assert "<th>Dead</th>" not in page
    assert page.count("<th>") * 3 == page.count("<td>")


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 110, 140])
def test_a_report_without_weights_fits(width: int) -> None:
    text = render_text(structure_only(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "126" in text


def test_the_document_is_never_folded() -> None:
    document = json.loads(FORMATS["json"].render(decoder(126), width=80, all_layers=False))
    assert len(document["layers"]) == 3 * 126 + 1
