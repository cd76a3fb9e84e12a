"""--layer and --all: which rows the table shows."""

from __future__ import annotations

import json

import pytest

from emscan.errors import UsageError
from emscan.report.select import matching
from emscan.report.table import render_text
from tests.cli.test_audit_command import MODEL, PROBE, emscan, failed
from tests.report.builder import gate, plain, report

BLOCKS = [row for i in range(30) for row in (gate(2 * i, f"layers.{i}.fc1"), plain(2 * i + 1, f"layers.{i}.fc2"))]


def shown(*patterns: str) -> list[str]:
    return [row.name for row in matching(report(*BLOCKS), patterns)]


def test_only_matching_layers_are_shown_with_their_findings() -> None:
    ran = emscan("audit", MODEL, "--probe", PROBE, "--layer", "2", "--layer", "[6]")
    assert ran.returncode == 0
    rows = [line.split("  ")[0] for line in ran.stdout.splitlines() if line.startswith(" Linear")]
    assert rows == [" Linear + ReLU", " Linear + Softmax + Cross-Entropy"]
    assert "2 of 4 layers shown (--layer)" in ran.stdout
    assert "EM101 warning layer 2:" in ran.stdout
    assert "layer 0:" not in ran.stdout
    assert "33 of 154 components are dead" in " ".join(ran.stdout.split())  # the whole model's


def test_a_pattern_without_match_is_a_usage_error() -> None:
    line = failed(emscan("audit", MODEL, "--probe", PROBE, "--layer", "2", "--layer", "fc*"))
    assert line == "emscan: error: --layer fc*: no layer has such a name; the names are 0, 2, 4, 6"


def test_json_is_whole_whatever_rows_the_table_would_show() -> None:
    ran = emscan("audit", MODEL, "--probe", PROBE, "--layer", "2", "--format", "json")
    assert ran.returncode == 0
    assert "--layer concerns the table" in ran.stderr
    assert len(json.loads(ran.stdout)["layers"]) == 4
    assert "no layer has such a name" in failed(emscan("audit", MODEL, "--layer", "x", "--format", "json"))


def test_globs_reach_below_dots_and_come_in_the_order_of_the_table() -> None:
    assert shown("layers.7.*") == ["layers.7.fc1", "layers.7.fc2"]
    assert shown("layers.2?.fc2", "layers.3.fc1") == ["layers.3.fc1", *(f"layers.2{i}.fc2" for i in range(10))]
    assert len(shown("*")) == 60


def test_a_name_is_a_pattern_for_itself_whatever_is_in_it() -> None:
    made = report(gate(0, "[bold]x"), gate(1, "b"))
    assert [row.name for row in matching(made, ["[bold]x"])] == ["[bold]x"]


def test_matching_layers_are_not_folded() -> None:
    text = render_text(report(*BLOCKS), 80, layers=["layers.*.fc1"])
    assert all(f"layers.{i}.fc1" in text for i in range(30))
    assert "share" not in text


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layers.7", "write 'layers.7.*' for what is below it"),
        ("layers.99.fc1", "names near it: layers.0.fc1, layers.0.fc2"),
        ("fc1", "names near it: layers.0.fc1, layers.1.fc1, layers.2.fc1, layers.3.fc1 +26"),
        ("qqqq", "the names are layers.0.fc1, layers.0.fc2, layers.1.fc1, layers.1.fc2 +56"),
    ],
)
def test_the_error_lists_near_names(pattern: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        shown(pattern)
    assert raised.value.hint == hint


def test_a_report_without_layers_says_so() -> None:
    with pytest.raises(UsageError, match="this report has no layers"):
        matching(report(), ["a"])
