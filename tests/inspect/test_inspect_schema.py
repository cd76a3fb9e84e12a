"""Documents fit the schema, and the schema is what the data classes say."""

from __future__ import annotations

import copy
import json
from importlib import resources

import jsonschema
import pytest
import torch
from torch import nn

from emscan.inspect import inspect
from emscan.inspect.schema import schema

VALIDATOR = jsonschema.Draft202012Validator(schema())


def test_the_schema_is_a_schema_and_its_copy_is_the_same():
    jsonschema.Draft202012Validator.check_schema(schema())
    text = resources.files("emscan.inspect").joinpath("inspect.schema.json").read_text(encoding="utf-8")
    assert text == json.dumps(schema(), indent=1) + "\n"


@pytest.fixture
def documents(saved, raw, sharded, written):
    folder = sharded(count=2, gigabytes=0.001)
    (folder / "model-00002-of-00002.safetensors").unlink()
    paths = [
        saved(nn.Linear(2, 2), "a.pt"), saved({"w": torch.ones(2), "lr": float("nan")}, "b.pt"), raw("{}"),
        str(folder), written(b"GGUF" + bytes(40), "m.gguf"),
    ]  # fmt: skip
    return [json.loads(json.dumps(inspect(path, check_values=True).to_dict(), allow_nan=False)) for path in paths]


def test_documents_fit(documents):
    for document in documents:
        VALIDATOR.validate(document)
        assert document["schema_version"] == 1
        assert document["totals"]["tensors"] == len(document["tensors"])
        assert sum(document["totals"]["dtypes"].values()) == len(document["tensors"])


def test_a_class_is_called_class(documents):
    assert documents[0]["modules"] == [{"name": "", "class": "torch.nn.modules.linear.Linear"}]


def _paths(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from _paths(value, (*path, key))
    elif isinstance(tree, list) and tree:
        yield from _paths(tree[0], (*path, 0))


def test_a_missing_or_misspelled_field_is_rejected(documents):
    document = documents[0]
    fields = [path for path in _paths(document) if path[0] not in ("tool", "metadata") and "dtypes" not in path[:-1]]
    assert len(fields) > 30
    for path in fields:
        changed = copy.deepcopy(document)
        holder = changed
        for step in path[:-1]:
            holder = holder[step]
        value = holder.pop(path[-1])
        assert not VALIDATOR.is_valid(changed), path
        holder[f"{path[-1]}_"] = value
        assert not VALIDATOR.is_valid(changed), path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2), (("status",), "fine"), (("bytes",), -1), (("tensors", 0, "shape"), [-1]),
        (("tensors", 0, "nan"), -1), (("totals", "parameters"), 1.5), (("audit", "supported"), None),
    ],
)  # fmt: skip
def test_wrong_values_are_rejected(documents, path, value):
    changed = copy.deepcopy(documents[0])
    holder = changed
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert not VALIDATOR.is_valid(changed)
