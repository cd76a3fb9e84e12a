"""Routers of real architectures, with planted experts: against float64 from the scores that their gates give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan
from tests.measure.test_routers import agrees

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import architectures

pytestmark = pytest.mark.filterwarnings("ignore")  # of a library that deprecates its own parts

DEAD, SECOND = 1, 2


def shares(s: Tensor) -> Tensor:
    return s / s.sum(-1, keepdim=True)


def soft(z: Tensor) -> Tensor:
    return z.softmax(-1)


def sigmoids(z: Tensor) -> Tensor:
    return shares(z.sigmoid())


def top(gate: nn.Module, z: Tensor, k: int) -> Tensor:
    return z.topk(k, -1).indices


def limited(gate: nn.Module, z: Tensor, k: int) -> Tensor:
    """The two best of four groups, by the sum of their two best."""
    parts = (z.sigmoid() + gate.e_score_correction_bias).unflatten(-1, (4, -1))
    chosen = parts.topk(2, -1).values.sum(-1).topk(2, -1).indices
    closed = torch.ones(parts.shape[:2], dtype=torch.bool).scatter(1, chosen, False)
    return parts.masked_fill(closed[..., None], float("-inf")).flatten(1).topk(k, -1).indices


# model type -> suffix of its gates' names, where the weight is in there, choices per token, what is chosen, posterior
FAMILIES = {
    "mixtral": ("mlp.gate", "weight", 2, top, soft),
    "qwen3_moe": ("mlp.gate", "weight", 2, top, soft),
    "gpt_oss": ("mlp.router", "weight", 2, top, soft),
    "deepseek_v3": ("mlp.gate", "weight", 2, limited, sigmoids),
    "llama4_text": ("feed_forward.router", "weight", 1, top, sigmoids),
    "jetmoe": ("router", "layer.weight", 2, top, soft),
    "phimoe": ("mlp.router", "weight", 2, top, soft),
    "switch_transformers": ("mlp.router", "classifier.weight", 1, top, soft),
    "nllb-moe": ("ffn.router", "classifier.weight", 2, top, soft),
    "kolibri1": (
        "mlp.gate", "weight", 2, lambda gate, z, k: top(gate, z + gate.e_score_correction_bias, k), sigmoids,
    ),
    "deepseek_v4": (
        "mlp.gate", "weight", 2,
        lambda gate, z, k: top(gate, F.softplus(z).sqrt() + gate.e_score_correction_bias, k),
        lambda z: shares(F.softplus(z).sqrt()),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def gates_of(model: nn.Module, suffix: str) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith(suffix)}


def inputs_of(model: nn.Module, values: dict[str, Tensor], gates: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return what every gate sees, (tokens, width)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args: seen.update({name: args[0].detach().reshape(-1, args[0].shape[-1])})

    hooks = [gate.register_forward_pre_hook(keep(name)) for name, gate in gates.items()]
    with torch.no_grad():
        model(**values)
    for hook in hooks:
        hook.remove()
    return seen


def planted(tokens: int, experts: int, generator: torch.Generator) -> Tensor:
    """Scores: one expert always last, one always second."""
    scores = torch.randn(tokens, experts, generator=generator, dtype=torch.float64).clamp(max=1.0)
    first = torch.randint(3, experts, (tokens,), generator=generator)
    scores[torch.arange(tokens), first] = 3.0 + torch.rand(tokens, generator=generator, dtype=torch.float64)
    scores[:, DEAD], scores[:, SECOND] = -4.0, 1.5
    return scores


def plant(model: nn.Module, values: dict[str, Tensor], gates: dict[str, nn.Module], weight: str) -> None:
    """Give every gate, in order, the weights with which it scores as planted on what it sees."""
    generator = torch.Generator().manual_seed(0)
    for name in list(inputs_of(model, values, gates)):
        seen = inputs_of(model, values, gates)[name].double()
        own = gates[name].get_parameter(weight)
        wanted = planted(len(seen), own.shape[0], generator)
        with torch.no_grad():
            own.copy_((torch.linalg.pinv(seen, rtol=1e-2) @ wanted).T)  # small weights: float32 scores are exact enough
            if hasattr(gates[name], "tid2eid"):  # a table of tokens chooses the experts, not the scores
                table = gates[name].tid2eid
                table.copy_(torch.randint(SECOND, own.shape[0], table.shape, generator=generator))
            for part in ("e_score_correction_bias", "bias"):
                bias = getattr(gates[name], part, None)
                if isinstance(bias, Tensor):
                    bias.copy_(torch.randn(bias.shape, generator=generator) * 0.02)


@pytest.mark.parametrize("experts", [None, "grouped_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_router_is_measured_as_it_chooses(name: str, experts: str | None) -> None:
    suffix, weight, k, choose, posterior = FAMILIES[name]
    try:
        model, values = architectures.build(name, None, experts)
    except architectures.SkipError:
        if experts is None:
            raise
        pytest.skip("this family has no such experts")
    gates = gates_of(model, suffix)
    for gate in gates.values():
        if hasattr(gate, "topk_group"):
            gate.num_group, gate.topk_group = 4, 2
    plant(model, values, gates, weight)
    report = emscan.audit(model, values)
    seen = inputs_of(model, values, gates)
    assert seen
    rows = {row.name: row for row in report.layers if row.alternatives and row.alternatives.kind == "experts"}
    for name, x in seen.items():
        row = next(row for title, row in rows.items() if f"{name}.{weight}".startswith(f"{title}."))
        bias = gates[name].bias if isinstance(getattr(gates[name], "bias", None), Tensor) else 0.0
        z = x.double() @ gates[name].get_parameter(weight).detach().double().T + bias
        hashed = getattr(gates[name], "tid2eid", None)
        chosen = choose(gates[name], z.float(), k) if hashed is None else hashed[values["input_ids"].flatten()]
        agrees(row, chosen, posterior(z.detach()), rel=1e-3)
    assert len(rows) == len(seen)
    assert any(DEAD in row.components.dead for row in rows.values())
    if k == 2:
        assert any(row.components.load[SECOND] > 0.1 for row in rows.values())
