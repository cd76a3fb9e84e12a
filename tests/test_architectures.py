"""Real architectures: audited without an exception, every competition-like call accounted for and counted twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import emscan

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import architectures
from operator_count import count

pytestmark = pytest.mark.filterwarnings("ignore")  # of a library that deprecates its own parts

TEXT = "bert albert deberta-v2 reformer longformer big_bird modernbert xlnet funnel perceiver"
DECODERS = "llama gpt2 bloom falcon gemma2 gpt_oss"
EXPERTS = "mixtral qwen3_moe deepseek_v3 jetmoe switch_transformers nllb-moe"
RECURRENT = "mamba mamba2 jamba rwkv recurrent_gemma lfm2 qwen3_next xlstm"
BOTH = "t5 bart"
IMAGES = "vit swin convnext segformer yolos rt_detr_v2"
OTHERS = "whisper wav2vec2 decision_transformer autoformer"
JOINED = "clip llava qwen2_5_vl blip-2"
NAMES = " ".join((TEXT, DECODERS, EXPERTS, RECURRENT, BOTH, IMAGES, OTHERS, JOINED)).split()
FORMS = [
    *((name, None, None) for name in NAMES),
    *((name, "eager", None) for name in ("llama", "bert", "t5", "swin", "gpt_oss", "qwen2_5_vl")),
    *((name, "eager", "eager") for name in ("mixtral", "qwen3_moe", "deepseek_v3")),
    *((name, None, "grouped_mm") for name in ("mixtral", "qwen3_moe", "deepseek_v3")),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "attention", "experts"), FORMS, ids=lambda part: part or "default")
def test_every_call_is_accounted_for(name, attention, experts):
    model, inputs = architectures.build(name, attention, experts)
    document = emscan.audit(model, inputs).to_dict()
    counted = count(model, inputs)
    assert counted, "the model has no competition-like operator"
    assert architectures.compare(document, counted) == []
    assert any(layer["verdict"] != "none" for layer in document["layers"])


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt_oss", "deepseek_v3", "vit", "whisper", "mamba"])
def test_the_evidence_is_there_and_small(name):
    model, inputs = architectures.build(name)
    assert architectures.unproven(emscan.audit(model, inputs).to_dict()) == []


def test_at_least_forty_architectures_are_tried():
    assert len(set(NAMES)) >= 40


def test_experts_run_in_the_form_that_was_asked_for():
    looped, _ = architectures.build("mixtral", experts="eager")
    grouped, _ = architectures.build("mixtral", experts="grouped_mm")
    assert looped.config._experts_implementation == "eager"
    assert grouped.config._experts_implementation == "grouped_mm"


def test_a_build_is_deterministic():
    first, inputs = architectures.build("bert")
    second, others = architectures.build("bert")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(inputs[name], others[name]) for name in inputs)
    assert not first.training


class Tiny(nn.Module):
    """Softmax, ReLU in place and tanh after a layer; a softmax of the raw input and a ReLU of a constant before it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        weights = x.softmax(-1) + torch.ones(4).relu()
        hidden = self.layer(weights)
        hidden.relu_()
        buffer = torch.zeros_like(hidden)
        buffer[:, 1:] = hidden[:, :-1]  # a part of a fresh tensor is written: the whole depends on the layer
        return buffer.tanh().softmax(-1), torch.zeros_like(hidden).sigmoid()


def test_the_independent_count_follows_dependence_through_writes():
    assert count(Tiny(), {"x": torch.randn(2, 4)}) == {"aten.relu": 1, "aten.tanh": 1, "aten.softmax": 1}


def test_a_difference_between_the_counts_is_found():
    model, inputs = Tiny(), {"x": torch.randn(2, 4)}
    document = emscan.audit(model, inputs).to_dict()
    wrong = count(model, inputs) + count(model, inputs)
    assert ("count", "aten.tanh: coverage says 1, counted 2") in architectures.compare(document, wrong)
    document["coverage"]["calls"][0]["calls"] += 1
    kinds = {kind for kind, _ in architectures.compare(document, count(model, inputs))}
    assert kinds == {"does not add up", "count"}


def test_a_type_that_cannot_be_built_says_why():
    with pytest.raises(architectures.SkipError, match="no model class"):
        architectures.build("no-such-type")
