"""Trends: a real run against a float64 pass, and series made by hand."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest

from emscan.compare.changes import compare
from emscan.compare.chart import ASCII, BLOCKS, Look, render_csv, render_text, sparkline
from emscan.compare.schema import trend_schema
from emscan.compare.series import Series, Trend, trend
from emscan.report.document import Report
from tests.compare.runs import PROBE, oracle
from tests.report.builder import gate, plain, report, softmax


@pytest.fixture(scope="module")
def reports(checkpoints: list[Path]) -> list[Report]:
    from emscan.load import load
    from emscan.pipeline import probe_for, run

    found = []
    for path in checkpoints:
        loaded = load(str(path))
        found.append(run(loaded, probe_for(loaded.module, PROBE)))
    return found


@pytest.fixture(scope="module")
def truth(checkpoints: list[Path]) -> list[dict]:
    return [oracle(path) for path in checkpoints]


def test_the_series_kills_and_revives_units(truth: list[dict]) -> None:
    """Else the tests below would test nothing."""
    for owner in ("0", "2"):
        lists = [set(one[owner]["dead"]) for one in truth]
        assert len(lists[-1]) > len(lists[0]) + 5
    assert any(before - after for before, after in _steps([set(one["2"]["dead"]) for one in truth]))


def _steps(values: list) -> list[tuple]:
    return list(pairwise(values))


def test_a_trend_says_what_a_float64_pass_says(reports: list[Report], truth: list[dict]) -> None:
    found = trend(reports)
    rows = {row.name: row for row in found.layers}
    for owner in ("0", "2"):
        dead = [set(one[owner]["dead"]) for one in truth]
        row = rows[owner]
        assert row.dead == [len(one) for one in dead]
        assert (row.dead_at_first, row.dead_at_last) == (sorted(dead[0]), sorted(dead[-1]))
        for place, (before, after) in enumerate(_steps(dead)):
            events = [event for event in row.events if event.after == place]
            assert all(event.before == place + 1 for event in events)
            assert {e.component for e in events if e.event == "died"} == after - before
            assert {e.component for e in events if e.event == "revived"} == before - after
    head = rows["4"]
    for name in ("normalized_entropy", "effective_components", "information"):
        wanted = [one["4"][name] for one in truth]
        assert getattr(head, name) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert head.starved == [len(one["4"]["starved"]) for one in truth]
    for place, one in enumerate(found.checkpoints):
        assert one.totals.dead == len(truth[place]["0"]["dead"]) + len(truth[place]["2"]["dead"])
        assert one.totals.information == pytest.approx(truth[place]["4"]["information"], rel=1e-4, abs=1e-6)
        assert one.totals.effective_share == pytest.approx(truth[place]["4"]["effective_components"] / 10, rel=1e-4)


def test_a_comparison_says_what_a_float64_pass_says(reports: list[Report], truth: list[dict]) -> None:
    for (old, new), (was, now) in zip(_steps(reports), _steps(truth), strict=True):
        found = compare(old, new)
        died = revived = 0
        for owner in ("0", "2"):
            before, after = set(was[owner]["dead"]), set(now[owner]["dead"])
            change = next((c.list_change("dead") for c in found.layers if c.name == owner), None)
            assert set(change.entered if change else ()) == after - before
            assert set(change.left if change else ()) == before - after
            died, revived = died + len(after - before), revived + len(before - after)
        assert (found.summary.died, found.summary.revived) == (died, revived)
        distance = sum(abs(b - a) for a, b in zip(was["4"]["load"], now["4"]["load"], strict=True)) / 2
        shifts = [shift.total_variation for c in found.layers if c.name == "4" for shift in c.loads]
        assert (shifts or [0.0])[0] == pytest.approx(distance, rel=1e-3, abs=1.1e-3)
        lost = next((c.information_lost for c in found.layers if c.name == "4"), None) or 0.0
        gap = was["4"]["information"] - now["4"]["information"]
        assert lost == pytest.approx(max(0.0, gap), rel=1e-3, abs=1e-5)


def test_events_add_up(reports: list[Report]) -> None:
    for row in trend(reports).layers:
        dead = set(row.dead_at_first)
        for event in row.events:
            if event.event in {"died", "revived"}:
                (dead.add if event.event == "died" else dead.remove)(event.component)
        assert sorted(dead) == row.dead_at_last


def seen(*reports_: Report | None) -> Trend:
    series = Series("step in the names")
    for place, one in enumerate(reports_):
        if one is None:
            series.fail(f"{place}.pt", place * 100, str(place * 100), "cannot load it")
        else:
            series.add(one, f"{place}.pt", place * 100, str(place * 100))
    return series.done()


def test_a_unit_that_dies_across_a_checkpoint_that_failed() -> None:
    found = seen(report(gate(0, "a")), None, report(gate(0, "a", dead=[3])), report(gate(0, "a", dead=[4])))
    row = found.layers[0]
    assert row.dead == [0, None, 1, 1]
    assert [(e.event, e.component, e.after, e.before) for e in row.events] == [
        ("died", 3, 0, 2), ("died", 4, 2, 3), ("revived", 3, 2, 3),
    ]  # fmt: skip
    text = render_text(found, Look())
    assert "100 failed: cannot load it" in text
    assert "  step 0 -> 200: died 3\n  step 200 -> 300: died 4; revived 3" in text
    assert "dead  ▁ ██  0 -> 1" in text


def test_a_row_that_comes_late_and_one_that_goes() -> None:
    found = seen(report(gate(0, "a", dead=[1])), report(gate(0, "b", dead=[2])), report(gate(0, "b")))
    a, b = found.layers
    assert (a.dead, b.dead) == ([1, None, None], [None, 1, 0])
    assert b.dead_at_first == [2]
    assert "already dead at step 100: 2" in render_text(found, Look())


def test_a_resized_row_is_not_followed() -> None:
    found = seen(report(gate(0, "a", dead=[1])), report(gate(0, "a", count=9, dead=[2])))
    assert not found.layers[0].events
    assert any("8 -> 9 units" in note for note in found.notes)


def test_starved_experts_are_followed_too() -> None:
    rows = [softmax(0, "router", kind="experts") for _ in range(3)]
    for row, starved in zip(rows, ([], [3, 4], [4]), strict=True):
        row.components.kind, row.components.starved = "experts", starved
    found = seen(*map(report, rows))
    assert [(e.event, e.component) for e in found.layers[0].events] == [
        ("starved", 3), ("starved", 4), ("recovered", 3),
    ]  # fmt: skip
    assert "step 0 -> 100: became starved 3, 4" in render_text(found, Look())


def test_another_probe_is_said_and_flagged() -> None:
    found = seen(report(gate(0, "a")), report(gate(0, "a"), samples=7))
    assert not found.same_probe
    text = render_text(found, Look())
    assert "NOT the same for all" in text
    assert "note: 100 ran on 7 samples, the first one on 100" in text


def test_rows_that_do_not_change_are_left_out() -> None:
    still = [gate(i, f"s{i}", dead=[1]) for i in range(1, 4)]
    found = seen(report(gate(0, "a"), *still), report(gate(0, "a", dead=[2]), *still))
    text = render_text(found, Look())
    assert "s1" not in text
    assert "3 rows do not change (--all shows them)" in text
    assert "s1  Linear + ReLU" in render_text(found, Look(everything=True))


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_table_of_a_long_run_keeps_its_width(width: int) -> None:
    many = [report(*(gate(i, f"layers.{i}.fc", dead=list(range(step % 8))) for i in range(30))) for step in range(90)]
    text = render_text(seen(*many), Look(width))
    assert max(map(len, text.splitlines())) <= width
    assert "30 of 90 checkpoints shown (--all)" in text
    assert "10 more rows change (--all shows them)" in text


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], ASCII) == ASCII
    assert sparkline([2, None, 2]) == "▁ ▁"
    assert sparkline([None]) == " "
    assert ASCII.isascii()
    found = seen(report(gate(0, "a")), report(gate(0, "a", dead=[1])))
    assert render_text(found, Look(blocks=ASCII)).isascii()


def test_csv_has_sums_and_rows(reports: list[Report], truth: list[dict]) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(trend(reports)))))
    sums = [row for row in rows if not row["layer"]]
    assert [int(row["dead"]) for row in sums] == [len(t["0"]["dead"]) + len(t["2"]["dead"]) for t in truth]
    died = [row["died"].split() for row in rows if row["layer"] == "0"]
    assert sorted({int(i) for some in died for i in some} | set(truth[0]["0"]["dead"])) >= truth[-1]["0"]["dead"]
    found = seen(report(gate(0, "=a", dead=[1])), None)
    rows = list(csv.DictReader(io.StringIO(render_csv(found))))
    assert [(row["status"], row["layer"], row["dead"]) for row in rows] == [
        ("ok", "", "1"), ("ok", "'=a", "1"), ("failed", "", ""),
    ]  # fmt: skip


def test_documents_fit_the_schema(reports: list[Report]) -> None:
    validator = jsonschema.Draft202012Validator(trend_schema())
    validator.check_schema(trend_schema())
    made = (trend(reports), seen(report(gate(0, "a"), plain(1, "b")), None), seen(None, None))
    for found in made:
        validator.validate(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
        for row in found.layers:
            lists = (row.dead, row.rare, row.normalized_entropy, row.information)
            assert {len(one) for one in lists} == {len(found.checkpoints)}
