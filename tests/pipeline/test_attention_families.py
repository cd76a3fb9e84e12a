"""Per-head statistics on the attention of real architectures, against attention written out in float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emscan
from emscan.report.document import Layer

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import architectures
from transformers.modeling_utils import AttentionInterface

pytestmark = pytest.mark.filterwarnings("ignore")  # of a library that deprecates its own parts
MASKED = -1e4


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ---- what attention does, in float64 ------------------------------------------------------------------------------


def scores_of(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, given: dict[str, Any]
) -> tuple[Tensor, int]:
    """Return the scores (N, H, L, S) of one call, -inf where hidden, and how many alternatives behind are sinks."""
    q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    s = q @ k.transpose(-2, -1) * (given.get("scaling") or q.shape[-1] ** -0.5)
    cap = given.get("softcap")
    if cap is not None:
        s = (s / cap).tanh() * cap
    bias = given.get("position_bias")
    s = s if bias is None else s + bias.double()
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > MASKED
        s = (s if mask.dtype == torch.bool else s + mask.double()).masked_fill(~shown, -math.inf)
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    sink = given.get("s_aux", given.get("sinks", getattr(module, "sinks", None)))
    if sink is None:
        return s, 0
    column = sink.double() if sink.dim() == 4 else sink.double().view(1, -1, 1, 1)
    return torch.cat([s, column.expand(*s.shape[:3], 1)], -1), 1


def statistics(s: Tensor, values: Tensor | None, sinks: int, real: Tensor | None) -> dict[str, Any]:
    """Return what a report should say of every head; ``real`` (N, L): which positions of self-attention are no padding."""
    n, _, length, size = s.shape
    keys = size - sinks
    counts = torch.isfinite(s[..., :keys]).any(-1)
    if real is not None and length == keys == real.shape[1] and n == real.shape[0]:
        counts = counts & real[:, None]
        s = torch.cat([s[..., :keys].masked_fill(~real[:, None, None], -math.inf), s[..., keys:]], -1)
    seen = torch.isfinite(s).sum(-1)
    r = torch.where(counts[..., None], s, 0.0).softmax(-1)
    several = counts & (seen >= 2)

    def mean(what: Tensor, over: Tensor = counts) -> list[float]:
        return (torch.where(over, what, 0.0).sum((0, 2)) / over.sum((0, 2))).tolist()

    found: dict[str, Any] = {
        "competitions": int(counts.sum()),
        "normalized_entropy": mean(torch.special.entr(r).sum(-1) / seen.clamp(min=2).log(), several),
        "hard_fraction": mean((r.amax(-1) >= 0.99).double(), several),
        "first_key": mean(r[..., 0]),
        "uniform_first_key": mean(1 / seen.clamp(min=1).double()),
    }
    if length == keys:
        found["diagonal"] = mean(r[..., :keys].diagonal(0, -2, -1))
    if values is not None:
        v = values.double().repeat_interleave(s.shape[1] // values.shape[1], 1)
        norms = torch.tensor(mean(torch.linalg.vector_norm(r[..., :keys] @ v, dim=-1)))
        found["output_norm"] = (norms / norms.mean()).tolist()
    return found


@contextmanager
def watched(model: nn.Module, real: Tensor | None) -> Iterator[dict[str, dict[str, Any]]]:
    """Collect the statistics of every attention module that goes by the library's interface, by the module's name."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, dict[str, Any]] = {}
    chosen = AttentionInterface.get_interface

    def get(self: AttentionInterface, implementation: str, default: Any) -> Any:
        function = chosen(self, implementation, default)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
        ) -> Any:
            causal = given.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            causal = implementation != "eager" and mask is None and query.shape[2] > 1 and causal
            s, sinks = scores_of(module, query, key, mask, causal, given)
            assert names[module] not in found, "called twice"
            found[names[module]] = statistics(s, value, sinks, real)
            return function(module, query, key, value, mask, **given)

        return attend

    AttentionInterface.get_interface = get
    try:
        yield found
    finally:
        AttentionInterface.get_interface = chosen


def check(row: Layer, expected: dict[str, Any]) -> int:
    """Compare a row with what it should say; return its number of heads."""
    spread = row.responsibility
    assert spread is not None
    assert spread.heads is not None, row.name
    assert spread.competitions == expected["competitions"], row.name
    for name, values in expected.items():
        if name != "competitions":
            assert [getattr(head, name) for head in spread.heads] == pytest.approx(values, rel=1e-4, abs=2e-6), name
    return len(spread.heads)


def keyed(report: emscan.Report) -> dict[str, Layer]:
    return {
        str(row.module): row
        for row in report.layers
        if row.alternatives is not None and row.alternatives.kind == "keys"
    }


# ---- families -----------------------------------------------------------------------------------------------------

# Grouped queries, relative biases in self- and cross-attention, shifted windows, learned sinks, capped scores, keys in
# two parts, queries that experts have gathered.
FAMILIES = [
    ("llama", "sdpa", {8}), ("llama", "eager", {8}), ("t5", "sdpa", {2}), ("t5", "eager", {2}),
    ("swin", "eager", {3, 6, 12, 24}), ("gpt_oss", "eager", {16}), ("gemma2", "eager", {2}),
    ("deepseek_v3", "eager", {32}), ("jetmoe", "eager", {8}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "attention", "heads"), FAMILIES, ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_head_of_a_family(name, attention, heads):
    model, inputs = architectures.build(name, attention)
    with watched(model, None) as expected, torch.no_grad():
        model(**inputs)
    rows = keyed(emscan.audit(model, inputs))
    assert len(expected) >= 2
    told = {check(rows[module], statistics) for module, statistics in expected.items()}
    assert told == heads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("bert", "sdpa"),
        ("bert", "eager"),
        ("bart", "eager"),
        ("gpt_oss", "eager"),
    ],
)
def test_padding_is_left_out(name, attention, side):
    model, inputs = architectures.build(name, attention)
    lengths = torch.tensor([16, 9])[:, None]
    places = torch.arange(16)
    real = places >= 16 - lengths if side == "left" else places < lengths
    inputs = {**inputs, "attention_mask": real.long()}
    with watched(model, real) as expected, torch.no_grad():
        model(**inputs)
    rows = keyed(emscan.audit(model, inputs))
    for module, statistics in expected.items():
        check(rows[module], statistics)
    assert any(statistics["competitions"] % 25 == 0 for statistics in expected.values())


@pytest.mark.parametrize("name", ["bloom", "deberta-v2"])
def test_attention_outside_the_interface(name):
    """Linear biases, and content and position apart: what the model says of its own weights."""
    model, inputs = architectures.build(name, "eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    rows = list(keyed(emscan.audit(model, inputs)).values())
    assert len(rows) == len(weights)
    for row, r in zip(rows, weights, strict=True):
        expected = statistics(r.double().log(), None, 0, None)
        assert check(row, expected) == model.config.num_attention_heads


def test_latents_that_attend_to_each_other_are_told_alike_in_both_forms():
    """Object queries meet each other before they meet the image: no input is in their scores."""
    found = []
    for attention in (None, "eager"):
        model, inputs = architectures.build("conditional_detr", attention)
        row = keyed(emscan.audit(model, inputs))["model.decoder.layers.0.self_attn"]
        assert row.responsibility is not None
        assert row.responsibility.heads is not None
        found.append([head.normalized_entropy for head in row.responsibility.heads])
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)
