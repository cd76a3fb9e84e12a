"""Folders whose files lie elsewhere, are missing, or are not what the configuration describes."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from tests.hostile.helpers import refusal
from tests.hostile.test_configurations import BERT

transformers = pytest.importorskip("transformers")
BESIDE = "weights must lie beside config.json"


@pytest.fixture
def folder(tmp_path):
    """A sound folder with an index and one shard."""
    path = tmp_path / "model"
    path.mkdir()
    config = transformers.BertConfig(**{key: value for key, value in BERT.items() if key not in ("model_type",)})
    state = transformers.BertModel(config).state_dict()
    (path / "config.json").write_text(json.dumps(BERT))
    safetensors.torch.save_file(state, path / "part.safetensors")
    indexed(path, "part.safetensors", state)
    return path


def indexed(path, name: object, names=("w",)) -> None:
    text = json.dumps({"weight_map": dict.fromkeys(names, name)})
    (path / "model.safetensors.index.json").write_text(text)


def test_the_folder_is_sound(folder):
    from emscan.load import load

    assert load(str(folder)).info.parameters > 0


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../x", "a\\..\\x", "x\0y", "//x/y"])
def test_shards_elsewhere(folder, name):
    (folder.parent / "secret.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
    indexed(folder, name)
    text = refusal(str(folder))
    assert text.endswith(f", named by model.safetensors.index.json, lies outside the folder; {BESIDE}")


def test_links_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "part.safetensors").rename(outside)
    (folder / "part.safetensors").symlink_to(outside)
    assert refusal(str(folder)) == (
        f"the file part.safetensors, named by model.safetensors.index.json, is a link out of the folder; {BESIDE}"
    )


def test_a_folder_that_is_a_link_out(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "part.safetensors").rename(tmp_path / "elsewhere" / "part.safetensors")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    indexed(folder, "inner/part.safetensors")
    assert "is a link out of the folder" in refusal(str(folder))


@pytest.mark.parametrize("name", ["absent.safetensors", "a" * 5000, "\ud800"])
def test_shards_that_are_missing(folder, name):
    indexed(folder, name)
    assert "is missing; copy or download the folder again" in refusal(str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"w": 3}}', "[" * 100_000]
)
def test_malformed_indices(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert refusal(str(folder)).startswith("its model.safetensors.index.json is malformed (")


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 10**5, "intermediate_size": 10**5}, {"vocab_size": 10**9}, {"max_position_embeddings": 2**31}],
)
def test_a_configuration_far_larger_than_the_weights(folder, fields):
    """transformers would allocate, and fill with random numbers, what the weights do not have."""
    (folder / "config.json").write_text(json.dumps({**BERT, **fields}))
    text = refusal(str(folder))
    assert text.startswith("its configuration describes ")
    assert text.endswith("; check the folder")


def test_a_shard_that_is_a_pickle(folder, canary):
    import os
    import pickle

    from tests.hostile.helpers import Call

    (folder / "part.safetensors").write_bytes(pickle.dumps(Call(os.system, f"touch {canary}"), 2))
    assert "it is a pickle that torch.save did not write" in refusal(str(folder))


def test_a_tensor_in_two_shards(folder):
    weights = safetensors.torch.load_file(folder / "part.safetensors")
    name = next(iter(weights))
    safetensors.torch.save_file({name: torch.ones(1)}, folder / "other.safetensors")
    index = {"weight_map": {**dict.fromkeys(weights, "part.safetensors"), "x": "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(str(folder)).startswith(
        "its file other.safetensors lacks x, which model.safetensors.index.json says"
    )
