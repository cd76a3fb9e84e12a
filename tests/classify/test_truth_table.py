"""Every case of the truth table gets exactly the rows that the theory gives it."""

from __future__ import annotations

import pytest

from emscan.classify.evidence import gather
from tests.classify import basic_cases, more_cases
from tests.classify.conftest import look_at, rows_of, seeded

CASES = {**basic_cases.CASES, **more_cases.CASES}


def test_the_two_tables_do_not_overlap() -> None:
    assert len(CASES) == len(basic_cases.CASES) + len(more_cases.CASES) > 180


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    builder, expected, objective = CASES[name]
    found = look_at(*seeded(builder), objective=objective or "auto")
    assert rows_of(found) == sorted(expected)
    assert not found.coverage.unclassified


@pytest.mark.parametrize("name", CASES)
def test_coverage_adds_up(name: str) -> None:
    builder, _, objective = CASES[name]
    found = look_at(*seeded(builder), objective=objective or "auto")
    for count in found.coverage.calls:
        assert count.calls == count.in_rows + count.absorbed + count.control + count.unclassified > 0


@pytest.mark.parametrize("name", [name for name, (_, rows, _) in CASES.items() if any(row[0] == "em" for row in rows)])
def test_evidence_holds(name: str) -> None:
    builder, _, objective = CASES[name]
    found = look_at(*seeded(builder), objective=objective or "auto")
    sites = [row.site for row in found.rows if row.site and row.site.verdict == "em"]
    assert sites
    for site in sites:
        evidence = gather(site, found.trace, 16.0)
        assert evidence.gradient_error is not None
        assert evidence.tolerance is not None
        assert evidence.gradient_error <= evidence.tolerance < 1e-2
        assert evidence.sum_error is None or evidence.sum_error <= evidence.tolerance
        assert evidence.differentiable
