"""What folders hold: shards by their index, sentence-transformers, weights alone; and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from emscan.errors import LoadError
from emscan.load import load
from emscan.load import source as sources
from emscan.load.source import Source


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(LoadError) as caught:
        load(str(path), **options)
    return str(caught.value).removeprefix(f"cannot load {path}: ")


@pytest.fixture(params=["safetensors", "bin"])
def shards(request, tmp_path) -> Path:
    save = safetensors.torch.save_file if request.param == "safetensors" else torch.save
    stem = "model" if request.param == "safetensors" else "pytorch_model"
    parts = [{"a.weight": torch.ones(2), "b.weight": torch.ones(3)}, {"c.weight": torch.ones(4)}]
    table = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-0000{number}-of-00002.{request.param}"
        save(part, tmp_path / name)
        table |= dict.fromkeys(part, name)
    (tmp_path / f"{stem}.{request.param}.index.json").write_text(json.dumps({"weight_map": table}))
    return tmp_path


def index(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


def rewritten(folder: Path, change) -> None:
    content = json.loads(index(folder).read_text())
    change(content["weight_map"])
    index(folder).write_text(json.dumps(content))


def test_the_folder_and_the_index_give_the_same(shards):
    whole, listed = load(str(shards)), load(str(index(shards)))
    assert list(whole.weights) == list(listed.weights) == ["a.weight", "b.weight", "c.weight"]
    assert whole.info.format == "sharded"
    assert whole.info.sha256 == listed.info.sha256
    assert whole.notes == []


def test_other_files_beside_the_index_are_not_read(shards):
    (shards / "model-00003-of-00002.safetensors").write_bytes(b"no safetensors")
    assert len(load(str(shards)).weights) == 3


def test_one_shard_says_that_it_is_one(shards):
    shard = sorted(shards.glob("*-of-*"))[1]
    loaded = load(str(shard))
    assert list(loaded.weights) == ["c.weight"]
    assert loaded.notes[0] == "the file is shard 2 of 2: give the folder or its index to load them all"


def test_a_tensor_that_the_named_shard_lacks(shards):
    def swap(table) -> None:
        table["a.weight"] = table["c.weight"]

    rewritten(shards, swap)
    assert f"lacks a.weight, which {index(shards).name} says it holds" in refusal(shards)


def test_a_tensor_that_the_index_does_not_name(shards):
    rewritten(shards, lambda table: table.pop("b.weight"))
    loaded = load(str(shards))
    assert list(loaded.weights) == ["a.weight", "c.weight"]
    assert loaded.notes == [f"tensors that {index(shards).name} does not name were left out: b.weight"]


@pytest.mark.parametrize("name", ["../up.safetensors", "/etc/passwd"])
def test_shards_outside_the_folder(shards, name):
    rewritten(shards, lambda table: table.update(x=name))
    for path in (shards, index(shards)):
        assert "lies outside the folder" in refusal(path)


def test_an_index_that_says_a_tensor_twice(shards):
    text = index(shards).read_text()
    index(shards).write_text(text.replace('"a.weight":', '"b.weight":', 1))
    assert "says b.weight twice" in refusal(shards)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "it is a diffusers pipeline of several models"),
        ({"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "x/y"}'}, "it is an adapter (LORA) to x/y"),
        ({"tf_model.h5": "", "config.json": '{"model_type": "bert"}'}, None),
        ({"tf_model.h5": ""}, "it is a folder with TensorFlow weights only"),
        ({"flax_model.msgpack": ""}, "it is a folder with Flax weights only"),
        ({"saved_model.pb": ""}, "it is a TensorFlow SavedModel"),
        ({"latest": "global_step1", "global_step1/mp_rank_00_model_states.pt": ""}, "it is a DeepSpeed checkpoint"),
        ({"a.pt": "", "b.pt": ""}, "it is a folder with 2 files of weights (a.pt, b.pt)"),
        ({"one/config.json": "{}"}, "it is a folder of folders; give one of them (one)"),
        ({}, "it is a folder; give the file inside that holds the weights"),
    ],
)  # fmt: skip
def test_folders_that_are_something_else(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if reason is None:  # the configuration tells the structure
        assert not load(str(tmp_path)).info.weights
    else:
        assert refusal(tmp_path).startswith(reason)


def test_a_configuration_that_names_no_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden": 3}')
    safetensors.torch.save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(load(str(tmp_path)).weights) == ["bias", "weight"]
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2)\n")
    assert load(str(tmp_path), model_target=f"{tmp_path}/net.py:make").module.weight.sum() == 6


@pytest.fixture
def sentences(tmp_path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    for entry in entries[1:]:
        (tmp_path / entry["path"]).mkdir()
    modes = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    dense = {
        "in_features": 16,
        "out_features": 4,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    tensors = {"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}
    safetensors.torch.save_file(tensors, tmp_path / "2_Dense" / "model.safetensors")
    return tmp_path


def test_a_sentence_transformer_computes_what_its_modules_say(sentences):
    transformers = pytest.importorskip("transformers")
    loaded = load(str(sentences))
    assert loaded.info.format == "sentence-transformers"
    bert = transformers.BertModel.from_pretrained(sentences).eval()
    ids = torch.randint(0, 30, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    states = bert(input_ids=ids, attention_mask=mask)[0]
    mean = torch.stack([row[: int(seen.sum())].mean(0) for row, seen in zip(states, mask, strict=True)])
    dense = safetensors.torch.load_file(sentences / "2_Dense" / "model.safetensors")
    output = torch.tanh(torch.cat([states[:, 0], mean], 1) @ dense["linear.weight"].T + dense["linear.bias"])
    torch.testing.assert_close(loaded.module(ids, mask), F.normalize(output, dim=1))


@pytest.mark.parametrize("mode", ["max", "mean_sqrt_len", "weightedmean", "lasttoken"])
def test_ways_of_pooling(mode):
    from emscan.load.sentences import Pooling

    states = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rows = []
    for row, seen in zip(states, mask, strict=True):
        tokens = row[: int(seen.sum())]
        places = torch.arange(1.0, len(tokens) + 1)[:, None]
        rows.append(
            {
                "max": tokens.amax(0),
                "mean_sqrt_len": tokens.sum(0) / len(tokens) ** 0.5,
                "weightedmean": (tokens * places).sum(0) / places.sum(),
                "lasttoken": tokens[-1],
            }[mode]
        )
    torch.testing.assert_close(Pooling([mode])(states, mask), torch.stack(rows))


@pytest.mark.parametrize(
    ("kind", "path", "reason"),
    [
        ("WordWeights", "1_Pooling", "its module WordWeights is not known here"),
        ("Pooling", "../x", "the file ../x, named by modules.json, lies outside the folder"),
        ("Pooling", "gone", "the file gone, named by modules.json, is missing"),
        ("Dense", "1_Pooling", "its 1_Pooling has no weights"),
    ],
)
def test_modules_that_are_not_there(sentences, kind, path, reason):
    entries = json.loads((sentences / "modules.json").read_text())
    entries[1] |= {"type": kind, "path": path}
    (sentences / "modules.json").write_text(json.dumps(entries))
    assert refusal(sentences).startswith(reason)


@pytest.mark.parametrize("text", ["[", "[]", "[3]", '[{"type": 3, "path": ""}]', "[" * 100_000])
def test_a_list_of_modules_that_is_malformed(tmp_path, text):
    (tmp_path / "modules.json").write_text(text)
    assert refusal(tmp_path).startswith("its modules.json is malformed")


def test_a_huge_file_of_another_kind_is_refused_by_its_first_bytes(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF\3\0\0\0")
        file.truncate(1 << 36)
    assert refusal(path).startswith("it is a GGUF model")
    with path.open("r+b") as file:
        file.write((60).to_bytes(8, "little") + b"{")
    monkeypatch.setattr(sources, "free_memory", lambda: 1 << 20)
    assert refusal(path).startswith("it has 68,719,476,736 bytes, more than the memory that is free")


def test_a_file_that_changes_between_its_first_bytes_and_the_rest(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(1 << 17))
    source = Source.read(str(path))
    path.write_bytes(b"x" * (1 << 17))
    with pytest.raises(sources.RefusalError, match="it changed while it was read"):
        _ = source.data
