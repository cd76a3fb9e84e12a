"""Where nothing that is large can be kept: the same rows, and evidence from excerpts or from a second look."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan
from emscan import discovery
from emscan.trace import excerpts, record
from tests.classify import basic_cases, more_cases
from tests.classify.conftest import same_rows

CASES = {**basic_cases.CASES, **more_cases.CASES}


def keep(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Let discovery keep ``first`` bytes at first, and small tensors not in any case."""
    monkeypatch.setattr(record, "_SMALL", 0)
    monkeypatch.setattr(discovery, "_budget", lambda: first)


def proven(document: dict[str, Any]) -> list[bool]:
    proofs = [row["evidence"] for row in document["layers"] if row["verdict"] == "em"]
    return [proof["gradient_error"] is not None for proof in proofs]


@pytest.mark.parametrize("name", CASES)
def test_the_truth_table_with_nothing_kept_at_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, expected, objective = CASES[name]
    torch.manual_seed(0)
    model, inputs = builder()
    whole = emscan.audit(model.eval(), inputs, objective=objective).to_dict()
    keep(monkeypatch, 0)
    found = emscan.audit(model, inputs, objective=objective).to_dict()
    rows = [layer for layer in found["layers"] if layer["verdict"] != "none"]
    assert same_rows([(r["verdict"], r["mechanism"], r["alternatives"]["count"]) for r in rows], expected)
    assert proven(found) == proven(whole)
    assert not any(finding["rule"] == "EM401" for finding in found["findings"])


class Encoder(nn.Module):
    """Known operators alone: attention, softmax over scores written out, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.up, self.down = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.first(x).unflatten(-1, (2, 8)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(-2)
        k = self.second(x)
        x = x + torch.softmax(k @ k.transpose(-2, -1), -1) @ k
        return self.down(F.silu(self.up(x)))


def test_known_operators_need_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, 0)
    budgets = []

    def spy(*args: Any, budget: int, **kwargs: Any) -> Any:
        budgets.append(budget)
        return record.record(*args, budget=budget, **kwargs)

    monkeypatch.setattr(discovery, "record", spy)
    report = emscan.audit(Encoder().eval(), torch.randn(2, 40, 16))
    assert budgets == [0]
    proofs = [row.evidence for row in report.layers if row.verdict == "em"]
    assert len(proofs) == 3
    for proof in proofs:
        assert proof is not None
        assert proof.tolerance is not None
        assert proof.gradient_error is not None
        assert 0 <= proof.gradient_error <= proof.tolerance
        assert proof.sum_error is not None
        assert proof.sum_error <= proof.tolerance


def test_what_is_not_kept_is_let_go_during_the_run() -> None:
    """The peak of discovery is that of the network, not of all its values together."""
    alive: list[int] = []

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
                gc.collect()
                alive.append(sum(1 for o in gc.get_objects() if type(o) is Tensor and o.shape == (700, 64)))
            return x

    with torch.inference_mode():
        record.record(Deep().eval(), (torch.randn(700, 64),), {}, budget=0)
    assert alive[-1] <= alive[0] + 1


def test_entries_are_the_same_places_in_any_memory_order() -> None:
    x = torch.randn(31, 17, 40)
    turned = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(excerpts.entries(x), excerpts.entries(turned))
    assert torch.equal(excerpts.entries(x), x.flatten()[:: -(-x.numel() // (1 << 12))])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_excerpts_of_a_softmax_are_whole_competitions(axis: int) -> None:
    scores = torch.randn(30, 40, 50)
    some, weights = excerpts.competitions(scores, scores.softmax(axis), axis)
    assert some.shape == weights.shape
    assert some.shape[1] == scores.shape[axis]
    assert torch.allclose(some.softmax(-1), weights)
