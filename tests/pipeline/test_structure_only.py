"""Audits without weights: the same rows as with weights, nothing measured, and said so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emscan
from emscan.cli import main
from emscan.report.document import Report

MEASURED = ("evidence", "components", "responsibility", "flags", "note")


def rows(report: Report, *left_out: str) -> list[dict[str, Any]]:
    """What a report says about structure, row by row."""
    found = [dataclasses.asdict(layer) for layer in report.layers]
    return [{name: value for name, value in row.items() if name not in {*MEASURED, *left_out}} for row in found]


def unmeasured(report: Report) -> bool:
    assert report.layers
    return all(layer.evidence is layer.components is layer.responsibility is None for layer in report.layers)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 8)
        self.mix = nn.Linear(8, 5)
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.gate(x))
        weights, chosen = self.router(hidden).softmax(-1).topk(2)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, torch.tanh(expert(hidden[token])) * weights[token, place, None])
        return self.mix(out).softmax(-1)


def test_a_module_on_meta() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 6)
    with torch.device("meta"):
        bare = Net()
    found, expected = emscan.audit(bare, inputs), emscan.audit(Net(), inputs)
    assert rows(found) == rows(expected)
    assert {row["mechanism"] for row in rows(found)} >= {"threshold", "truncation", "logistic", "softmax"}
    assert unmeasured(found)
    assert (found.model.weights, expected.model.weights) == (False, True)
    assert found.summary.status == "ok"
    assert all(p.is_meta and type(p) is nn.Parameter for p in bare.parameters())


def test_a_module_on_meta_finds_its_inputs() -> None:
    with torch.device("meta"):
        report = emscan.audit(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1)))
    assert [layer.composition for layer in report.layers] == ["Linear + ReLU", "Linear + Softmax"]
    assert report.probe.synthetic


def test_the_table_says_that_nothing_was_measured() -> None:
    with torch.device("meta"):
        text = str(emscan.audit(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))))
    assert "structure only: no weights, so no statistics" in text
    assert "dead" not in text.lower()
    assert "indicative" not in text


# -- architectures of transformers ---------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50, "num_hidden_layers": 2}
MIXTURE = {**TEXT, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **TEXT, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "first_k_dense_replace": 1,
}  # fmt: skip
ENCODER_DECODER = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50, "decoder_start_token_id": 0,
}  # fmt: skip
STATES = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 50, "use_mambapy": False}
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}

IDS = torch.arange(24).view(2, 12) % 50
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "llama": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1}, {"input_ids": IDS}),
    "bert": ("BertForMaskedLM", TEXT, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "t5": ("T5ForConditionalGeneration", ENCODER_DECODER, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    "mixtral": ("MixtralForCausalLM", MIXTURE, {"input_ids": IDS}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT, {"input_ids": IDS}),
    "vit": ("ViTForImageClassification", VISION, {"pixel_values": PIXELS[..., :16, :16]}),
    "swin": ("SwinModel", WINDOWS, {"pixel_values": PIXELS}),
    "mamba": ("MambaForCausalLM", STATES, {"input_ids": IDS}),
    "gpt_oss": ("GptOssForCausalLM", {**MIXTURE, "head_dim": 8, "sliding_window": 4}, {"input_ids": IDS}),
}


def pair(class_name: str, fields: dict[str, Any], **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return a model with random weights and the same one without."""
    from emscan.load import huggingface

    kind = getattr(transformers, class_name)
    config = kind.config_class(**fields)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return kind(config).eval(), huggingface.build(huggingface.Plan(kind, config))


@pytest.mark.parametrize("case", CASES)
def test_same_rows_as_with_weights(case: str) -> None:
    class_name, fields, inputs = CASES[case]
    model, bare = pair(class_name, fields)
    found, expected = emscan.audit(bare, inputs), emscan.audit(model, inputs)
    assert rows(found) == rows(expected)
    assert found.coverage.unclassified == expected.coverage.unclassified == []
    assert unmeasured(found)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_experts_in_every_form(experts: str) -> None:
    class_name, fields, inputs = CASES["mixtral"]
    model, bare = pair(class_name, fields, _experts_implementation=experts)
    found, expected = emscan.audit(bare, inputs), emscan.audit(model, inputs)
    assert rows(found, "calls") == rows(expected, "calls")  # which experts a batch wakes is up to the weights
    assert sum(row["mechanism"] == "truncation" for row in rows(found)) == 2


def test_eager_attention() -> None:
    class_name, fields, inputs = CASES["llama"]
    model, bare = pair(class_name, fields, _attn_implementation="eager")
    assert rows(emscan.audit(bare, inputs)) == rows(emscan.audit(model, inputs))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process and return its exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["emscan", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return run


def test_the_command_line(tmp_path, capsys, command) -> None:
    fields = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **LATENT}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert command("audit", tmp_path, "--format", "json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["weights"] is False
    assert report["model"]["format"] == "transformers"
    assert report["summary"]["status"] == "ok"
    assert report["summary"]["components"] == 0
    assert {layer["evidence"] for layer in report["layers"]} == {None}
    assert [layer["alternatives"]["count"] for layer in report["layers"] if layer["mechanism"] == "truncation"] == [8]
    assert "indicative" not in json.dumps(report["findings"])


def test_a_probe_may_be_given(tmp_path, capsys, command) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **TEXT}))
    save_file({"input_ids": IDS}, tmp_path / "probe.safetensors")
    assert command("audit", tmp_path / "config.json", "--probe", tmp_path / "probe.safetensors") == 0
    assert "structure only" in capsys.readouterr().out
