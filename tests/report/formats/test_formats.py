"""Every format: what its consumer accepts, and what it says of two known reports."""

from __future__ import annotations

import pytest

from emscan.report.formats import FORMATS
from tests.report.formats import validators
from tests.report.formats.samples import SETTING, SNAPSHOTS, mixed, snapshot

CHECKED = {
    "sarif": validators.sarif,
    "junit": validators.junit,
    "github": validators.github,
    "gitlab": validators.gitlab,
    "csv": validators.components,
    "markdown": validators.markdown,
}


def test_every_format_has_a_validator_and_a_snapshot() -> None:
    assert set(CHECKED) == set(FORMATS) - {"table", "json"}
    assert {path.stem for path in SNAPSHOTS.iterdir()} == set(CHECKED)


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_snapshot(name: str) -> None:
    """`python -m tests.report.formats.samples` writes them anew."""
    assert snapshot(name) == (SNAPSHOTS / f"{name}.txt").read_bytes().decode()


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_the_consumer_accepts_it(name: str) -> None:
    fmt = FORMATS[name]
    one = fmt.render(mixed(), setting=SETTING)
    end = fmt.end if name == "csv" else ""
    CHECKED[name](one + end)
    CHECKED[name](fmt.render_many([mixed(), mixed()], setting=SETTING) + end)
    CHECKED[name](fmt.render_many([], setting=SETTING) + end)
    assert fmt.render(mixed(), setting=SETTING) == one


def test_without_a_setting_formats_still_work() -> None:
    for name, check in CHECKED.items():
        check(FORMATS[name].render(mixed()) + (FORMATS[name].end if name == "csv" else ""))
