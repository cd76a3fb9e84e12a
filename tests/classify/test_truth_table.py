"""Every case of the truth table gets exactly the rows that the theory gives it."""

from __future__ import annotations

import functools

import pytest

from emscan.classify import Classification
from emscan.classify.evidence import gather
from tests.classify import basic_cases, hard_cases, more_cases
from tests.classify.conftest import look_at, rows_of, same_rows, seeded

TABLES = (basic_cases.CASES, more_cases.CASES, hard_cases.CASES)
CASES = {name: entry for table in TABLES for name, entry in table.items()}


def readings(name: str) -> list[list[tuple]]:
    """The rows of a case, and where the rules leave more than one reading, the others."""
    return [CASES[name][1], *hard_cases.OPEN.get(name, [])]


@functools.cache
def looked_at(name: str) -> Classification:
    """What one traced run of a case says; several tests ask."""
    builder, _, objective = CASES[name]
    return look_at(*seeded(builder), objective=objective or "auto")


def test_the_tables_do_not_overlap() -> None:
    assert len(CASES) == sum(map(len, TABLES)) > 300


def test_every_open_reading_belongs_to_a_case() -> None:
    assert set(hard_cases.OPEN) <= set(hard_cases.CASES)


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ([("em", "softmax", 6)], [("em", "softmax", None)], True),
        ([("em", "softmax", 6), ("em", "softmax", 4)], [("em", "softmax", None), ("em", "softmax", 6)], True),
        ([("em", "softmax", 6), ("em", "softmax", 6)], [("em", "softmax", 6)], False),
        ([("em", "softmax", 6)], [("em", "softmax", 6), ("em", "logistic", 2)], False),
        ([("em", "softmax", 6)], [("em", "softmax", 7)], False),
    ],
)
def test_rows_are_compared_as_bags(got: list[tuple], expected: list[tuple], same: bool) -> None:
    assert same_rows(got, expected) is same


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    found = looked_at(name)
    got = rows_of(found)
    assert any(same_rows(got, rows) for rows in readings(name)), (got, readings(name))
    assert not found.coverage.unclassified


@pytest.mark.parametrize("name", CASES)
def test_coverage_adds_up(name: str) -> None:
    found = looked_at(name)
    for count in found.coverage.calls:
        assert count.calls == count.in_rows + count.absorbed + count.control + count.unclassified > 0


@pytest.mark.parametrize(
    "name", [name for name in CASES if all(any(row[0] == "em" for row in rows) for rows in readings(name))]
)
def test_evidence_holds(name: str) -> None:
    found = looked_at(name)
    sites = [row.site for row in found.rows if row.site and row.site.verdict == "em"]
    assert sites
    flows = []
    for site in sites:
        evidence = gather(site, found.trace, 16.0)
        assert evidence.gradient_error is not None
        assert evidence.tolerance is not None
        assert evidence.gradient_error <= evidence.tolerance
        assert evidence.tolerance < 1e-2 or evidence.dtype in ("bfloat16", "float16")
        assert evidence.sum_error is None or evidence.sum_error <= evidence.tolerance
        flows.append(evidence.differentiable)
    assert all(flows) is (name not in hard_cases.DETACHED)
