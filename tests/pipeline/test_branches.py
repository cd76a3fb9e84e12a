"""Branches that first appear in a later batch become rows, and count from there on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import emscan


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.relu(self.a(x)) if x[0, 0] > 0 else torch.tanh(self.b(x)))


def test_a_later_branch_is_found_and_measured() -> None:
    torch.manual_seed(0)
    ones = torch.rand(6, 4)
    batches = [ones, ones, -ones, -ones, ones]
    model = Branching()
    report = emscan.audit(model, batches, targets=None)
    rows = {layer.name: layer for layer in report.layers}
    assert rows["a"].mechanism == "threshold"
    assert rows["b"].mechanism == "logistic"
    assert rows["b"].responsibility.competitions == 2 * 6 * 6
    z = model.a(torch.cat([ones] * 3))
    assert rows["a"].components.on_rate == pytest.approx((z > 0).double().mean(0).tolist())


def test_experts_that_wake_up_later_keep_the_rest_of_the_network_measured() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.head = nn.Linear(4, 4), nn.Linear(5, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU()) for _ in range(4))

        def forward(self, x):
            w, i = self.gate(x).softmax(-1).max(-1)
            out = x.new_zeros(len(x), 5)
            for e in i.unique().tolist():
                rows = torch.where(i == e)[0]
                out[rows] = self.experts[e](x[rows]) * w[rows, None]
            return self.head(out)

    torch.manual_seed(1)
    model, x, y = Experts(), torch.randn(120, 4) * 3, torch.randint(0, 3, (120,))
    full = emscan.audit(model, x, targets=y)
    for size in (1, 5, 40):
        part = emscan.audit(model, x, targets=y, batch_size=size)
        assert [layer.name for layer in part.layers if layer.verdict != "none"]
        for layer in full.layers:
            same = next(row for row in part.layers if (row.name, row.mechanism) == (layer.name, layer.mechanism))
            if layer.components is not None:
                assert same.components.dead == layer.components.dead
                assert same.components.on_rate == layer.components.on_rate
            if layer.mechanism == "softmax":
                assert same.responsibility.competitions == 120
                assert same.responsibility.entropy.mean == pytest.approx(layer.responsibility.entropy.mean)
