"""Hugging Face folders and configurations: what loads, what does not, and that nothing of theirs runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emscan.errors import LoadError, UsageError
from emscan.load import load

transformers = pytest.importorskip("transformers")

SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 40,
}  # fmt: skip


def configuration(folder: Path, **changes: Any) -> str:
    fields = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder / "config.json")


def refusal(path: str | Path, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load(str(path), **options)
    text = str(caught.value)
    assert text.startswith(f"cannot load {path}: ")
    assert "\n" not in text
    return text.removeprefix(f"cannot load {path}: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A folder with weights, and the model that was saved there."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(1)
    fields = {name: value for name, value in SMALL.items() if name not in {"model_type", "architectures"}}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def copied(whole: tuple[Path, torch.nn.Module], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def same_weights(loaded: torch.nn.Module, saved: torch.nn.Module) -> bool:
    mine, theirs = loaded.state_dict(), saved.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- with weights -------------------------------------------------------------------------------------------------


def test_a_folder_with_weights(whole) -> None:
    folder, model = whole
    found = load(str(folder))
    assert type(found.module) is transformers.LlamaForCausalLM
    assert same_weights(found.module, model)
    assert (found.info.format, found.info.weights, found.info.trusted) == ("transformers", True, False)
    assert found.info.parameters == sum(p.numel() for p in model.parameters())
    assert found.notes == []


def test_the_digest_covers_the_weights(whole, copied) -> None:
    before = load(str(whole[0])).info.sha256
    assert load(str(copied)).info.sha256 == before
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert load(str(copied)).info.sha256 != before


def test_shards(whole, tmp_path) -> None:
    whole[1].save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert same_weights(load(str(tmp_path)).module, whole[1])


def test_weights_of_torch_save(whole, tmp_path) -> None:
    configuration(tmp_path)
    torch.save(whole[1].state_dict(), tmp_path / "pytorch_model.bin")
    assert same_weights(load(str(tmp_path)).module, whole[1])


def test_names_of_old_checkpoints_are_translated(tmp_path) -> None:
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=40
    )
    model = transformers.BertModel(config)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in model.state_dict().items()}  # fmt: skip
    assert any(name.endswith("gamma") for name in old)
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert same_weights(load(str(tmp_path)).module, model)


def test_the_architecture_named_decides_the_class(copied) -> None:
    configuration(copied, architectures=["LlamaModel"])
    found = load(str(copied))
    assert type(found.module) is transformers.LlamaModel
    (note,) = found.notes
    assert note == "tensors that a LlamaModel does not have were left out: lm_head.weight"


def test_the_bare_configuration_does_not_read_the_weights(whole) -> None:
    found = load(str(whole[0] / "config.json"))
    assert not found.info.weights
    assert found.notes == ["the weights beside it are not read: give the folder to load them"]


def drop(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def test_weights_that_lack_some_are_refused(copied) -> None:
    drop(copied, "model.layers.1.mlp.up_proj.weight")
    assert refusal(copied) == (
        "its weights do not fill a LlamaForCausalLM: 1 missing (model.layers.1.mlp.up_proj.weight); check the folder, "
        "or pass --partial to audit what fits"
    )


def test_weights_of_other_shapes_are_refused(copied) -> None:
    configuration(copied, intermediate_size=20)
    text = refusal(copied)
    assert "LlamaForCausalLM" in text
    assert "check the" in text


def index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x"])
def test_shards_stay_in_the_folder(copied, shard) -> None:
    index(copied, shard)
    assert "lies outside the folder; weights must lie beside config.json" in refusal(copied)


def test_a_shard_that_is_missing(copied) -> None:
    index(copied, "gone.safetensors")
    assert refusal(copied) == (
        "the file gone.safetensors, named by model.safetensors.index.json, is missing; copy or download the folder again"
    )


def test_links_out_of_the_folder(copied, tmp_path) -> None:
    (copied / "model.safetensors").rename(tmp_path / "elsewhere")
    (copied / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors is a link out of the folder" in refusal(copied)


def test_links_of_the_hub_cache(whole, tmp_path) -> None:
    revision = tmp_path / "models--a--b" / "snapshots" / "1234"
    revision.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        blob = tmp_path / "models--a--b" / "blobs" / name.replace(".", "-")
        shutil.copy(whole[0] / name, blob)
        (revision / name).symlink_to(blob)
    assert same_weights(load(str(revision)).module, whole[1])


@pytest.mark.parametrize(
    "content", ["[", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}', "[" * 100_000]
)
def test_a_malformed_index(copied, content) -> None:
    (copied / "model.safetensors.index.json").write_text(content)
    assert refusal(copied).startswith("its model.safetensors.index.json is malformed (")


def test_damaged_weights(copied) -> None:
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert refusal(copied).startswith("its file model.safetensors does not load: ")


def test_quantized_weights_are_refused_and_quantized_structure_is_not(copied) -> None:
    path = configuration(copied, quantization_config={"quant_method": "fp8"})
    assert refusal(copied) == "its weights are quantized (fp8); give its config.json to audit the structure"
    assert any("quantization" in note for note in load(path).notes)


# -- without ------------------------------------------------------------------------------------------------------


def test_a_configuration_alone(tmp_path) -> None:
    found = load(configuration(tmp_path))
    assert type(found.module) is transformers.LlamaForCausalLM
    assert all(p.is_meta for p in found.module.parameters())
    assert (found.info.format, found.info.weights) == ("transformers", False)
    assert load(str(tmp_path)).info.weights is False
    assert load(str(tmp_path)).notes == []


def test_buffers_that_follow_from_the_configuration_keep_their_numbers(tmp_path) -> None:
    module = load(configuration(tmp_path)).module
    assert torch.isfinite(module.model.rotary_emb.inv_freq).all()
    path = configuration(tmp_path, model_type="bert", architectures=["BertModel"], num_key_value_heads=None)
    positions = load(path).module.embeddings.position_ids
    assert torch.equal(positions, torch.arange(positions.shape[1])[None])


def test_tied_weights_stay_one(tmp_path) -> None:
    module = load(configuration(tmp_path, tie_word_embeddings=True)).module
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_without_architectures_the_base_model(tmp_path) -> None:
    assert type(load(configuration(tmp_path, architectures=None)).module) is transformers.LlamaModel


def test_without_model_type_the_class_says_it(tmp_path) -> None:
    assert type(load(configuration(tmp_path, model_type=None)).module) is transformers.LlamaForCausalLM


def test_weights_in_another_format_are_named(tmp_path) -> None:
    configuration(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    found = load(str(tmp_path))
    assert not found.info.weights
    assert found.notes == ["tf_model.h5 is of a format that is not read here: structure only"]


def test_any_name_will_do_for_the_file(tmp_path) -> None:
    path = Path(configuration(tmp_path))
    path.rename(tmp_path / "llama-405b.json")
    assert load(str(tmp_path / "llama-405b.json")).info.format == "transformers"


def test_billions_of_parameters_allocate_nothing(tmp_path) -> None:
    found = load(
        configuration(
            tmp_path, num_hidden_layers=16, hidden_size=16384, num_attention_heads=128, num_key_value_heads=8,
            intermediate_size=53248, vocab_size=128256,
        )
    )  # fmt: skip
    assert found.info.parameters > 50e9
    assert all(p.is_meta for p in found.module.parameters())


# -- what is wrong with a configuration ------------------------------------------------------------------------------


def test_model_with_a_configuration(tmp_path) -> None:
    with pytest.raises(UsageError, match="already holds its architecture"):
        load(configuration(tmp_path), model_target="torch.nn:Identity")


def test_text_that_is_no_json(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    assert refusal(tmp_path / "config.json").startswith("its configuration is not JSON (")
    (tmp_path / "config.json").write_text("")
    assert refusal(tmp_path).startswith("its configuration is not JSON (")
    (tmp_path / "config.json").write_text("[1]")
    assert refusal(tmp_path).startswith("its configuration is no JSON object")


def test_deep_json(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert refusal(tmp_path).startswith("its configuration is nested too deep")


def test_an_unknown_model_type(tmp_path) -> None:
    text = refusal(configuration(tmp_path, model_type="no-such", architectures=None))
    known = f"transformers {transformers.__version__}"
    assert text == f"its model_type 'no-such' is unknown to {known}; a newer transformers may know it"
    assert "neither model_type nor architectures" in refusal(
        configuration(tmp_path, model_type=None, architectures=None)
    )


@pytest.mark.parametrize("name", ["NoSuchModel", "LlamaConfig", "pipeline", "AutoTokenizer", "PreTrainedModel.x", "os"])
def test_an_architecture_that_is_no_model_of_transformers(tmp_path, name) -> None:
    text = refusal(configuration(tmp_path, architectures=[name]))
    assert text.startswith(("its architecture", "its architectures are no names"))


def test_architecture_and_type_that_do_not_go_together(tmp_path) -> None:
    text = refusal(configuration(tmp_path, architectures=["BertModel"]))
    assert text.startswith("its architecture BertModel does not go with its model_type 'llama'")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"hidden_size": 10**15}, {"hidden_size": "wide"},
        {"vocab_size": -1}, {"num_attention_heads": 0}, {"dtype": "banana"},
        {"architectures": [3]}, {"architectures": "x"}, {"rope_parameters": {"rope_type": "no-such"}}, {"model_type": 3},
    ],
)  # fmt: skip
def test_sizes_and_types_that_nothing_can_be_built_from(tmp_path, changes) -> None:
    assert refusal(configuration(tmp_path, **changes)).startswith(("its ", "transformers cannot build its Llama"))


def test_more_modules_than_any_model_has(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("emscan.shapeless.build._MOST_PARTS", 500)
    text = refusal(configuration(tmp_path, num_hidden_layers=90_000))
    assert "it asks for more than 500 modules and parameters" in text


def test_transformers_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refusal(configuration(tmp_path)) == (
        "its architecture is in transformers, which is not installed; "
        "install emscan[transformers]: pip install 'emscan[transformers]'"
    )


# -- code ------------------------------------------------------------------------------------------------------------

CODE = """
import pathlib
import torch
from transformers import PretrainedConfig, PreTrainedModel
pathlib.Path({mark!r}).touch()

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(4, 3)
        self.post_init()

    def forward(self, input_values):
        return torch.relu(self.layer(input_values))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code of its own, which leaves a mark where it runs."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    table = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnModel"}
    configuration(folder, model_type="own", architectures=["OwnModel"], auto_map=table)
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def test_code_in_the_folder_does_not_run(own, tmp_path) -> None:
    text = refusal(own)
    assert text == (
        "its architecture is Python code of its own (auto_map), and not part of transformers; "
        "if you trust where it comes from, pass --trust"
    )
    assert not (tmp_path / "ran").exists()


def test_code_in_the_folder_runs_with_trust(own, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = load(str(own), trust=True)
    assert (tmp_path / "ran").exists()
    assert type(found.module).__name__ == "OwnModel"
    assert found.info.trusted


def test_code_of_another_repository_is_not_fetched(own) -> None:
    configuration(
        own, model_type="own", auto_map={"AutoConfig": "a/b--code.OwnConfig", "AutoModel": "a/b--code.OwnModel"}
    )
    assert "another repository" in refusal(own, trust=True)


def test_auto_map_is_not_used_where_transformers_knows_the_model(own, tmp_path) -> None:
    configuration(own, auto_map={"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"})
    found = load(str(own))
    assert type(found.module) is transformers.LlamaForCausalLM
    assert found.notes == ["transformers knows this architecture: the code that auto_map names is not used"]
    assert not (tmp_path / "ran").exists()


def test_kernels_and_attention_that_a_configuration_asks_for_are_left_out(tmp_path) -> None:
    path = configuration(tmp_path, attn_implementation="a/b", _attn_implementation="a/b", experts_implementation="a/b")
    assert load(path).module.config._attn_implementation in {"sdpa", "eager"}
