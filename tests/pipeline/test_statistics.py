"""Statistics of whole audits against an independent float64 computation, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import emscan

CLOSE = {"rel": 1e-4, "abs": 1e-9}


def entropy(r: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(r).sum(-1)


@pytest.mark.parametrize("batch_size", [1, 7, 64, None])
def test_classifier(batch_size: int | None) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 9))
    x, y = torch.randn(190, 6) * 2, torch.randint(0, 9, (190,))
    report = emscan.audit(model, x, targets=y, batch_size=batch_size)
    gate, head = report.layers
    wide = model.double()
    with torch.no_grad():
        z = wide[0](x.double())
        r = wide(x.double()).softmax(-1)
    model.float()
    on = torch.sigmoid(2 * z)
    both = torch.stack([on, 1 - on], -1)
    assert gate.responsibility.mean == pytest.approx(on.mean().item(), **CLOSE)
    assert gate.responsibility.entropy.mean == pytest.approx(entropy(both).mean().item(), **CLOSE)
    assert gate.responsibility.saturated == pytest.approx((both.amax(-1) >= 0.99).double().mean().item(), **CLOSE)
    assert gate.responsibility.max.mean == pytest.approx(both.amax(-1).mean().item(), **CLOSE)
    h, load = entropy(r), r.mean(0)
    found = head.responsibility
    assert head.composition == "Linear + Softmax + Cross-Entropy"
    assert found.competitions == 190
    assert found.entropy.mean == pytest.approx(h.mean().item(), **CLOSE)
    assert found.entropy.min == pytest.approx(h.min().item(), **CLOSE)
    assert found.entropy.max == pytest.approx(h.max().item(), **CLOSE)
    assert found.normalized_entropy == pytest.approx(h.mean().item() / math.log(9), **CLOSE)
    assert found.information == pytest.approx((entropy(load) - h.mean()).item(), **CLOSE)
    assert found.effective_components == pytest.approx(entropy(load).exp().item(), **CLOSE)
    assert found.max.mean == pytest.approx(r.amax(-1).mean().item(), **CLOSE)
    assert head.components.load == pytest.approx(load.tolist(), **CLOSE)
    width = math.log(9) / 4096
    for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        low = torch.quantile(h, q, interpolation="lower").item()
        high = torch.quantile(h, q, interpolation="higher").item()
        assert low - width <= getattr(found.entropy, name) <= high + width


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["fused", "explicit"])
def test_attention_per_head(causal: bool, form: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            if form == "fused":
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2)
            s = q @ k.mT / 2
            if causal:
                s = s.masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -math.inf)
            return (s.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    torch.manual_seed(2)
    model = Attention()
    x = torch.randn(10, 7, 12) * 2
    row = next(layer for layer in emscan.audit(model, x, batch_size=4).layers if layer.mechanism == "softmax")
    with torch.no_grad():
        q, k, _ = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in model.double().qkv(x.double()).chunk(3, -1))
    s = q @ k.mT / 2
    visible = torch.ones(7, 7, dtype=torch.bool)
    if causal:
        visible = visible.tril()
        s = s.masked_fill(~visible, -math.inf)
    r = s.softmax(-1)
    seen = visible.sum(-1)
    h = entropy(r)[..., seen >= 2]
    share = h / seen[seen >= 2].double().log()
    found = row.responsibility
    assert row.alternatives.kind == "keys"
    assert row.alternatives.count == 7
    assert row.components is None
    assert found.competitions == 10 * 3 * 7
    assert found.entropy.mean == pytest.approx(h.mean().item(), **CLOSE)
    assert found.normalized_entropy == pytest.approx(share.mean().item(), **CLOSE)
    assert len(found.heads) == 3
    for i, head in enumerate(found.heads):
        assert head.normalized_entropy == pytest.approx(share[:, i].mean().item(), **CLOSE)
        assert head.first_key == pytest.approx(r[:, i, :, 0].mean().item(), **CLOSE)
        assert head.diagonal == pytest.approx(r[:, i].diagonal(0, -2, -1).mean().item(), **CLOSE)


def test_uniform_responsibilities_have_perfect_load_and_no_information() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 16)

        def forward(self, x):
            return torch.softmax(-F.relu(self.fc(x)), 1)

    model = Encoder()
    with torch.no_grad():
        model.fc.weight.mul_(1e-4)
        model.fc.bias.fill_(1e-3)
    report = emscan.audit(model, torch.randn(300, 6))
    row = report.layers[-1]
    assert row.responsibility.effective_components == pytest.approx(16, rel=1e-4)
    assert row.responsibility.information < 1e-6
    assert max(row.components.variance) < 0.01
    assert "EM201" in {finding.rule for finding in report.findings}


def test_recurrent_gates() -> None:
    torch.manual_seed(3)
    model = nn.LSTM(5, 4, batch_first=True)
    x = torch.randn(6, 9, 5)
    row = emscan.audit(model, x, batch_size=2).layers[0]
    wide = nn.LSTM(5, 4, batch_first=True).double()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = wide(x.double())[0]
        before = torch.cat([torch.zeros(6, 1, 4).double(), outputs[:, :-1]], 1)
        a = F.linear(x.double(), wide.weight_ih_l0, wide.bias_ih_l0) + F.linear(
            before, wide.weight_hh_l0, wide.bias_hh_l0
        )
    i, f, g, o = a.chunk(4, -1)
    r = torch.sigmoid(torch.cat([i, f, 2 * g, o], -1))
    assert row.composition == "LSTM"
    assert row.components.count == 16
    assert row.responsibility.mean == pytest.approx(r.mean().item(), **CLOSE)
    assert row.components.on_rate == pytest.approx((r > 0.5).double().mean((0, 1)).tolist(), abs=1e-9)
    assert row.evidence.gradient_error <= row.evidence.tolerance
