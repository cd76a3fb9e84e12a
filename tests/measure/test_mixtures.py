"""Mixture heads: mass N_k, load and effective components of densities with fixed and with computed means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import emscan

C, D = 6, 3


class Prototypes(nn.Module):
    def __init__(self, use) -> None:
        super().__init__()
        self.enc, self.out, self.use = nn.Linear(5, D), nn.Linear(C, 2), use
        self.mu, self.log_s = nn.Parameter(torch.randn(C, D)), nn.Parameter(0.3 * torch.randn(C))
        self.log_pi = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return self.use(self, self.enc(x))

    def squares(self, z: Tensor) -> Tensor:
        return ((z.unsqueeze(-2) - self.mu) ** 2).sum(-1)

    def densities(self, z: Tensor) -> Tensor:
        """log pi_k + log N(z; mu_k, s_k^2), (..., C)."""
        normal = D * (self.log_s + 0.5 * math.log(2 * math.pi))
        return self.log_pi.log_softmax(-1) - 0.5 * self.squares(z) / (2 * self.log_s).exp() - normal


def in_separate_values(m, z):
    parts = [m.log_pi[k] - 0.5 * ((z - m.mu[k]) ** 2).sum(-1) for k in range(C)]
    total = parts[0]
    for part in parts[1:]:
        total = torch.logaddexp(total, part)
    return total


# name -> (what the model does, its scores in float64, the mechanism)
HEADS = {
    "gaussian, softmax": (lambda m, z: m.out(m.densities(z).softmax(-1)), lambda m, z: m.densities(z), "softmax"),
    "gaussian, log-likelihood": (lambda m, z: m.densities(z).logsumexp(-1), lambda m, z: m.densities(z), "softmax"),
    "gaussian, by hand": (
        lambda m, z: (lambda e: m.out(e / e.sum(-1, keepdim=True)))(m.densities(z).exp()),
        lambda m, z: m.densities(z),
        "softmax",
    ),
    "gaussian, exp minus log Z": (
        lambda m, z: (lambda e: m.out((e - e.logsumexp(-1, keepdim=True)).exp()))(m.densities(z)),
        lambda m, z: m.densities(z),
        "softmax",
    ),
    "rbf": (
        lambda m, z: m.out((-0.5 * torch.cdist(z, m.mu) ** 2).softmax(-1)),
        lambda m, z: -0.5 * m.squares(z),
        "softmax",
    ),
    "student-t": (
        lambda m, z: (lambda k: m.out(k / k.sum(-1, keepdim=True)))((1 + m.squares(z) / 3).pow(-2.0)),
        lambda m, z: -2 * torch.log1p(m.squares(z) / 3),
        "kernel",
    ),
    "inverse distance": (
        lambda m, z: (lambda k: m.out(k / k.sum(-1, keepdim=True)))(1 / (torch.cdist(z, m.mu) + 0.1)),
        lambda m, z: -(m.squares(z).sqrt() + 0.1).log(),
        "kernel",
    ),
    "in separate values": (in_separate_values, lambda m, z: m.log_pi - 0.5 * m.squares(z), "softmax"),
}


@pytest.mark.parametrize("name", HEADS)
def test_mass_load_and_effective_components(name: str) -> None:
    use, scores_of, mechanism = HEADS[name]
    model, x = Prototypes(use), torch.randn(400, 5) * 2
    report = emscan.audit(model, x, batch_size=150)
    row = next(r for r in report.layers if r.verdict == "em" and r.alternatives.kind != "prior")
    model.double()
    with torch.no_grad():
        scores = scores_of(model, model.enc(x.double()))
    r = scores.softmax(-1)
    load, h = r.mean(0), -torch.special.xlogy(r, r).sum(-1)
    total = -float(torch.special.xlogy(load, load).sum())
    parts, spread = row.components, row.responsibility
    assert row.mechanism == mechanism
    assert row.alternatives.persistent
    assert (row.alternatives.count, parts.count, spread.competitions) == (C, C, 400)
    assert parts.mass == pytest.approx(r.sum(0).tolist(), rel=1e-4)
    assert sum(parts.mass) == pytest.approx(400, rel=1e-6)
    assert parts.load == pytest.approx(load.tolist(), rel=1e-4)
    assert spread.effective_components == pytest.approx(math.exp(total), rel=1e-4)
    assert spread.entropy.mean == pytest.approx(float(h.mean()), rel=1e-4)
    assert spread.information == pytest.approx(total - float(h.mean()), rel=1e-3)
    assert parts.variance == pytest.approx(scores.var(0, correction=0).tolist(), rel=1e-3)
    correlation = torch.corrcoef(scores.T).square()
    assert parts.correlation_energy == pytest.approx(float(correlation.sum()) - C, rel=1e-3)
    assert parts.correlated is None


class MixtureDensity(nn.Module):
    """Logits, means and scales that depend on the input; the log-likelihood of a target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 16)
        self.logits, self.mu, self.log_s = nn.Linear(16, C), nn.Linear(16, C), nn.Linear(16, C)

    def joint(self, x, y):
        h = self.body(x).tanh()
        log_s = self.log_s(h)
        normal = -0.5 * ((y - self.mu(h)) / log_s.exp()) ** 2 - log_s - 0.5 * math.log(2 * math.pi)
        return self.logits(h).log_softmax(-1) + normal

    def forward(self, x, y):
        return self.joint(x, y).logsumexp(-1)


def test_a_trained_mixture_density_network() -> None:
    x = torch.randn(400, 5)
    y = torch.where(torch.rand(400, 1) < 0.5, x[:, :1], -x[:, :1]) + 0.1 * torch.randn(400, 1)
    model = MixtureDensity()
    step = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        step.zero_grad()
        loss = -model(x, y).mean()
        loss.backward()
        step.step()
    report = emscan.audit(model, (x, y))
    rows = [layer for layer in report.layers if layer.mechanism == "softmax"]
    assert [row.statistic for row in rows] == ["log", "log-partition"]
    model.double()
    with torch.no_grad():
        h = model.body(x.double()).tanh()
        prior, posterior = model.logits(h).softmax(-1), model.joint(x.double(), y.double()).softmax(-1)
    for row, r in zip(rows, (prior, posterior), strict=True):
        assert row.components.mass == pytest.approx(r.sum(0).tolist(), rel=1e-4)
        load = r.mean(0)
        effective = math.exp(-float(torch.special.xlogy(load, load).sum()))
        assert row.responsibility.effective_components == pytest.approx(effective, rel=1e-4)
        uniform = 1 / C
        assert row.components.starved == (load < 0.01 * uniform).nonzero().flatten().tolist()


def test_steps_of_a_recursion_are_no_components() -> None:
    """The same layer at every step: the alternatives are times, and have no identity."""

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(5, 1)

        def forward(self, x):
            parts = [self.score(x[:, t]) for t in range(4)]
            total = parts[0]
            for part in parts[1:]:
                total = torch.logaddexp(total, part)
            return total

    model, x = Forward(), torch.randn(50, 4, 5)
    row = next(layer for layer in emscan.audit(model, x).layers if layer.mechanism == "softmax")
    assert row.components is None
    with torch.no_grad():
        r = model.score(x).squeeze(-1).double().softmax(-1)
    h = -torch.special.xlogy(r, r).sum(-1)
    assert row.responsibility.entropy.mean == pytest.approx(float(h.mean()), rel=1e-4)
    assert row.responsibility.competitions == 50
