"""Sparse autoencoders in their usual forms: density per latent, dead and starved latents, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan

M, KEPT, DEAD = 40, 5, [3, 17]


class Sparse(nn.Module):
    """``code``: from the module and the input to the code; latents 3 and 17 never win."""

    def __init__(self, code) -> None:
        super().__init__()
        self.enc, self.gate, self.dec = nn.Linear(9, M), nn.Linear(9, M), nn.Linear(M, 9)
        self.threshold, self.scale = nn.Parameter(torch.rand(M) * 0.5), nn.Parameter(torch.rand(M))
        self.code = code
        with torch.no_grad():
            for layer in (self.enc, self.gate):
                layer.weight[DEAD], layer.bias[DEAD] = 0, -40

    def forward(self, x):
        return self.dec(self.code(self, x))


def scattered(values: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(*values.shape[:-1], M).scatter(-1, indices, values)


def by_scatter(m, x):
    return scattered(*m.enc(x).topk(KEPT, -1))


def by_relu_first(m, x):
    return scattered(*F.relu(m.enc(x) + 20).topk(KEPT, -1))


def by_relu_after(m, x):
    values, indices = m.enc(x).topk(KEPT, -1)
    return scattered(F.relu(values), indices)


def by_threshold(m, x):
    a = m.enc(x)
    return torch.where(a >= a.topk(KEPT, -1).values[..., -1:], a, 0.0)


def by_mask(m, x):
    a = F.relu(m.enc(x) + 20)
    return a * torch.zeros_like(a).scatter(-1, a.topk(KEPT, -1).indices, 1.0)


def by_sorting(m, x):
    values, indices = m.enc(x).sort(-1, descending=True)
    return scattered(values[..., :KEPT], indices[..., :KEPT])


def by_order_statistic(m, x):
    a = m.enc(x)
    return a * (a > a.kthvalue(M - KEPT, -1, keepdim=True).values)


class Decoded(Sparse):
    """The decoder's rows are looked up instead of a sparse product."""

    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, x):
        values, indices = self.enc(x).topk(KEPT, -1)
        return (values.unsqueeze(-1) * self.dec.weight.T[indices]).sum(-2) + self.dec.bias


TOP = {
    "scatter": lambda: Sparse(by_scatter),
    "relu first": lambda: Sparse(by_relu_first),
    "relu after": lambda: Sparse(by_relu_after),
    "threshold": lambda: Sparse(by_threshold),
    "mask": lambda: Sparse(by_mask),
    "sorting": lambda: Sparse(by_sorting),
    "order statistic": lambda: Sparse(by_order_statistic),
    "rows looked up": Decoded,
}


@pytest.mark.parametrize("name", TOP)
@pytest.mark.parametrize("shape", [(150, 9), (30, 5, 9)])
def test_top_k_latents(name: str, shape: tuple[int, ...]) -> None:
    model, x = TOP[name](), torch.randn(shape)
    report = emscan.audit(model, x, batch_size=shape[0] // 3)
    row = next(layer for layer in report.layers if layer.mechanism == "truncation")
    with torch.no_grad():
        chosen = model.enc(x).reshape(150, M).topk(KEPT, -1).indices
    kept = torch.zeros(150, M, dtype=torch.float64).scatter(-1, chosen, 1.0)
    parts, spread = row.components, row.responsibility
    assert (row.alternatives.kind, row.alternatives.count) == ("latents", M)
    assert parts.on_rate == pytest.approx(kept.mean(0).tolist(), abs=1e-12)
    assert parts.load == pytest.approx((kept.sum(0) / kept.sum()).tolist(), abs=1e-12)
    assert parts.dead == (kept.sum(0) == 0).nonzero().flatten().tolist()
    assert set(DEAD) <= set(parts.dead)
    assert spread.competitions == 150
    assert parts.upper_bound == pytest.approx(1 - 0.05 ** (1 / shape[0]))
    assert parts.variance is not None
    assert parts.starved == []


def test_top_k_over_a_whole_batch() -> None:
    def code(m, x):
        a = F.relu(m.enc(x)).flatten()
        values, indices = a.topk(KEPT * len(x))
        return torch.zeros_like(a).scatter(0, indices, values).view(len(x), M)

    model, x = Sparse(code), torch.randn(90, 9)
    row = next(layer for layer in emscan.audit(model, x, batch_size=45).layers if layer.mechanism == "truncation")
    with torch.no_grad():
        kept = torch.cat([code(model, part) > 0 for part in x.split(45)]).double()
    assert int(kept.sum()) == KEPT * 90  # no zero was kept
    assert (row.alternatives.kind, row.components.count) == ("latents", M)
    assert row.components.on_rate == pytest.approx(kept.mean(0).tolist(), abs=1e-12)
    assert row.components.dead == (kept.sum(0) == 0).nonzero().flatten().tolist()
    assert row.responsibility.competitions == 90


def test_starved_is_relative_to_the_uniform_share() -> None:
    model = Sparse(by_scatter)
    with torch.no_grad():
        model.enc.weight[5], model.enc.bias[5] = 0, 0
        model.enc.weight[5, 0], model.enc.bias[5] = 30, -30 * 3.1  # kept for a normal input about once in a thousand
    x = torch.randn(20_000, 9)
    row = next(layer for layer in emscan.audit(model, x, batch_size=5000).layers if layer.mechanism == "truncation")
    with torch.no_grad():
        kept = torch.zeros(len(x), M).scatter(-1, model.enc(x).topk(KEPT, -1).indices, 1.0).mean(0)
    few = (kept > 0) & (kept / KEPT < 0.01 / M)
    assert row.components.starved == few.nonzero().flatten().tolist() == [5]


GATED = {
    "relu": lambda m, x: F.relu(m.enc(x)),
    "jump relu": lambda m, x: (lambda a: a * (a > m.threshold))(m.enc(x)),
    "jump relu of a relu": lambda m, x: (lambda a: a * (a > m.threshold).float())(F.relu(m.enc(x))),
    "jump relu, log threshold": lambda m, x: (lambda a: torch.where(a > m.threshold.exp(), a, 0.0))(m.enc(x)),
    "gated": lambda m, x: (
        (x @ m.enc.weight.T + m.enc.bias > 0).float() * F.relu(x @ m.enc.weight.T * m.scale.exp() + 30)
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_density_of_latents_behind_thresholds(name: str) -> None:
    model, x = Sparse(GATED[name]), torch.randn(700, 9)
    with torch.no_grad():
        density = (model.code(model, x) > 0).double().mean(0)
    rows = [layer for layer in emscan.audit(model, x, batch_size=300).layers if layer.mechanism == "threshold"]
    row = rows[0]  # of a gated one, the gate; its magnitude is a row of its own, and always on here
    assert row.components.count == M
    assert row.components.on_rate == pytest.approx(density.tolist(), abs=1e-12)
    assert row.components.dead == (density == 0).nonzero().flatten().tolist()
    assert set(DEAD) <= set(row.components.dead)
    assert row.components.rare == ((density > 0) & (density < 0.01)).nonzero().flatten().tolist()


def test_a_trained_autoencoder_with_planted_dead_latents() -> None:
    x = (torch.randn(500, 12) * (torch.rand(500, 12) < 0.2)) @ torch.randn(12, 9)
    model = Sparse(by_scatter)
    step = torch.optim.Adam(model.parameters(), 1e-2)
    before = F.mse_loss(model(x), x).item()
    for _ in range(100):
        step.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        step.step()
    assert loss.item() < 0.3 * before
    report = emscan.audit(model, x)
    row = next(layer for layer in report.layers if layer.mechanism == "truncation")
    with torch.no_grad():
        kept = torch.zeros(500, M).scatter(-1, model.enc(x).topk(KEPT, -1).indices, 1.0).mean(0)
    assert row.components.on_rate == pytest.approx(kept.double().tolist(), abs=1e-6)
    assert row.components.dead == (kept == 0).nonzero().flatten().tolist()
    finding = next(f for f in report.findings if f.rule == "EM105")
    assert set(DEAD) <= set(finding.components)
