"""Folders: by the file in them that says what they hold."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from emscan.errors import LoadError
from emscan.inspect import inspect


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}


def test_names_come_from_the_index_and_shapes_from_the_shards(sharded):
    found = inspect(str(sharded(count=2, gigabytes=1, layers=2)))
    assert found.format == "transformers"
    assert [file.name for file in found.files] == [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert [(one.name, one.dtype, one.shape, one.file[:11]) for one in found.tensors] == [
        (f"model.layers.{i}.mlp.weight", "bfloat16", [250_000, 1000], f"model-0000{1 + i // 2}") for i in range(4)
    ]
    assert found.metadata["model_type"] == "llama"
    assert found.metadata["architectures"] == ["LlamaForCausalLM"]


def test_missing_shards_are_said(sharded):
    folder = sharded(count=3, gigabytes=1, layers=2)
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = inspect(str(folder))
    assert found.notes == ["1 of 3 shards are missing: model-00002-of-00003.safetensors"]
    assert [file.bytes for file in found.files if file.format == "missing"] == [None]
    assert [one.shape for one in found.tensors] == [[250_000, 1000]] * 2 + [None] * 2 + [[250_000, 1000]] * 2
    assert not found.audit.supported
    assert found.audit.reason == (
        "1 of its shards are missing (model-00002-of-00003.safetensors); copy or download the folder again"
    )


def test_an_index_alone_and_what_it_does_not_name(sharded):
    folder = sharded(count=1, gigabytes=1, layers=2)
    (folder / "config.json").unlink()
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lost.weight"] = "model-00001-of-00001.safetensors"
    del table["weight_map"]["model.layers.0.mlp.weight"]
    index.write_text(json.dumps(table))
    for path in (folder, index):
        found = inspect(str(path))
        assert found.format == "sharded"
        assert [one.name for one in found.tensors] == ["model.layers.1.mlp.weight"]
        assert found.audit.reason.startswith("its file model-00001-of-00001.safetensors lacks lost.weight")
        assert any(
            note.startswith("1 tensors in model-00001-of-00001.safetensors are left out") for note in found.notes
        )


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        (
            "../w.safetensors",
            "the file ../w.safetensors, named by model.safetensors.index.json, lies outside the folder",
        ),
        ("/etc/passwd", "the file /etc/passwd, named by model.safetensors.index.json, lies outside the folder"),
        (
            "link.safetensors",
            "the file link.safetensors, named by model.safetensors.index.json, is a link out of the folder",
        ),
    ],
)
def test_shards_stay_in_the_folder(tmp_path, shard, reason):
    folder = tmp_path / "model"
    write(folder, "config.json", CONFIG)
    write(folder, "model.safetensors.index.json", {"weight_map": {"w": shard}})
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(LoadError) as caught:
        inspect(str(folder))
    assert str(caught.value).startswith(f"cannot inspect {folder}: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "its config.json is nested too deep"),
        ("{", "its config.json is not JSON"),
        ('"x"', "its config.json is no JSON object"),
        ('{"a":' * 100_000, "its config.json is nested too deep"),
    ],
)
def test_a_broken_configuration(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError) as caught:
        inspect(str(tmp_path))
    assert f"cannot inspect {tmp_path}: {reason}" in str(caught.value)


def test_sharded_pickles_list_their_imports(tmp_path):
    write(tmp_path, "config.json", CONFIG)
    write(tmp_path, "pytorch_model.bin.index.json", {"weight_map": {"a": "x.bin", "b": "y.bin"}})
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "y.bin")
    found = inspect(str(tmp_path), check_values=True)
    assert [(one.name, one.file, one.nan) for one in found.tensors] == [("a", "x.bin", 0), ("b", "y.bin", 0)]
    assert found.pickle.imports == ["torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"]


def test_code_of_its_own_needs_trust(tmp_path):
    write(tmp_path, "config.json", {"model_type": "own_model", "auto_map": {"AutoModel": "own.Net"}})
    found = inspect(str(tmp_path))
    assert found.audit.needs_trust
    assert found.audit.command == f"emscan audit {tmp_path} --trust"
    write(tmp_path, "config.json", {**CONFIG, "auto_map": {"AutoModel": "own.Net"}})
    assert not inspect(str(tmp_path)).audit.needs_trust


def test_sentence_transformers(tmp_path):
    write(tmp_path, "modules.json", [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ])  # fmt: skip
    write(tmp_path, "config.json", {"model_type": "bert"})
    write(tmp_path, "1_Pooling/config.json", {"word_embedding_dimension": 4})
    write(tmp_path, "2_Dense/config.json", {"in_features": 4})
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "2_Dense/model.safetensors")
    found = inspect(str(tmp_path))
    assert found.format == "sentence-transformers"
    assert [(one.name, one.file, one.shape) for one in found.tensors] == [
        ("w", "model.safetensors", [2]), ("w", "2_Dense/model.safetensors", [3]),
    ]  # fmt: skip
    assert found.metadata["modules"][2] == "sentence_transformers.models.Dense"


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(LoadError, match="it is a folder; give the file inside that holds the weights"):
        inspect(str(tmp_path))
    (tmp_path / "saved_model.pb").write_bytes(b"")
    found = inspect(str(tmp_path))
    assert (found.status, found.title) == ("not supported", "a TensorFlow SavedModel")


class Call:
    def __reduce__(self):
        return os.system, ("touch sung",)


class Metadata:
    def __init__(self):
        self.state_dict_metadata = {}
        self.planner_data = Call()


def test_a_distributed_checkpoint_with_a_foreign_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata()))
    found = inspect(str(tmp_path))
    assert [one.name for one in found.pickle.refused] == [f"{__name__}.Metadata", "posix.system"]
    assert not found.audit.supported
    assert found.audit.reason.startswith(f"reading its .metadata would import {__name__}.Metadata, which torch's own")
    assert not (tmp_path / "sung").exists()
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Call()}))
    with pytest.raises(LoadError, match=r"its \.metadata does not say which tensors there are"):
        inspect(str(tmp_path))
