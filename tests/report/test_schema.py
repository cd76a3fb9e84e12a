"""The schema accepts reports and rejects what is none."""

from __future__ import annotations

import copy
import json
import math
from importlib import resources

import jsonschema
import pytest

from emscan.report.formats import FORMATS
from emscan.report.schema import schema
from tests.report.builder import gate, report, seed, softmax

VALIDATOR = jsonschema.Draft202012Validator(schema())


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_copy_in_the_repository_is_the_schema() -> None:
    copy = resources.files("emscan.report").joinpath("report.schema.json").read_text(encoding="utf-8")
    assert copy == json.dumps(schema(), indent=1) + "\n"


@pytest.mark.parametrize("made", [seed(), seed(synthetic=True), report(), report(gate(0, "a"), unclassified=("x.y",))])
def test_reports_are_accepted(made) -> None:
    VALIDATOR.validate(json.loads(FORMATS["json"].render(made, width=10, all_layers=False)))


def _paths(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from _paths(value, (*path, key))
    elif isinstance(tree, list) and tree:
        yield from _paths(tree[0], (*path, 0))


FREE = {"tool", "environment"}  # open objects
DOCUMENT = seed().to_dict()
FIELDS = [p for p in _paths(DOCUMENT) if p[0] not in FREE or len(p) == 1]


@pytest.mark.parametrize("path", FIELDS, ids=lambda p: ".".join(map(str, p)))
def test_a_missing_or_misspelled_field_is_rejected(path) -> None:
    document = copy.deepcopy(DOCUMENT)
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    value = holder.pop(path[-1])
    assert not VALIDATOR.is_valid(document)
    holder[f"{path[-1]}_"] = value
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("layers", 0, "verdict"), "maybe"),
        (("layers", 0, "mechanism"), "magic"),
        (("layers", 0, "calls"), 0),
        (("layers", 0, "alternatives", "kind"), "things"),
        (("layers", 0, "components", "on_rate"), [1.5]),
        (("layers", 0, "components", "dead"), [-1]),
        (("layers", 0, "components", "dead"), ["3"]),
        (("layers", 3, "responsibility", "entropy", "mean"), "nan"),
        (("layers", 3, "responsibility", "hard_fraction"), 1.01),
        (("findings", 0, "level"), "fatal"),
        (("findings", 0, "rule"), "E1"),
        (("summary", "status"), "fine"),
        (("model", "sha256"), "abc"),
        (("probe", "samples"), 1.5),
        (("tool",), {"name": "emscan"}),
        (("thresholds", "rare"), 1.5),
        (("summary", "dead"), -1),
        (("findings", 0, "fingerprint"), "v1"),
        (("layers", 0, "alternatives", "count"), 0),
    ],
)
def test_wrong_values_are_rejected(path, value) -> None:
    document = copy.deepcopy(DOCUMENT)
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert not VALIDATOR.is_valid(document)


def test_numbers_that_are_not_finite_become_null() -> None:
    row = softmax(0, "head")
    row.responsibility.normalized_entropy = math.nan
    row.components.load[0] = math.inf
    document = report(row).to_dict()
    assert document["layers"][0]["responsibility"]["normalized_entropy"] is None
    assert document["layers"][0]["components"]["load"][0] is None
    json.dumps(document, allow_nan=False)
    VALIDATOR.validate(document)


def test_row_counts_add_up_to_the_summary() -> None:
    summary = seed().summary
    assert summary.layers == summary.em + summary.soft + summary.hard + summary.none == 5
    assert (summary.em, summary.em_two_way, summary.hard, summary.none) == (1, 0, 3, 1)
    assert (summary.components, summary.dead) == (34, 2)
