"""Variance, redundancy and information of whole rows, and the findings: what load alone does not show."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan

CODES = {"EM201", "EM205"}


def findings(report) -> dict[str, str]:
    return {f.rule: f.message for f in report.findings if f.rule in CODES}


def head(scores) -> nn.Module:
    return nn.Sequential(scores, nn.Softmax(-1))


def layer_of(report):
    return next(layer for layer in report.layers if layer.mechanism == "softmax")


def energy(scores: Tensor) -> float:
    """Sum of squared correlations between different columns, float64."""
    return float(torch.corrcoef(scores.double().T).square().sum()) - scores.shape[-1]


@pytest.mark.parametrize("count", [3, 100, 200])
def test_the_row_equals_float64(count: int) -> None:
    layer, x = nn.Linear(6, count), torch.randn(450, 6)
    parts = layer_of(emscan.audit(head(layer), x, batch_size=200)).components
    with torch.no_grad():
        scores = layer(x).double()
    assert parts.variance == pytest.approx(scores.var(0, correction=0).tolist(), rel=1e-4)
    assert parts.correlation_energy == pytest.approx(energy(scores), rel=1e-4)
    assert parts.redundancy == pytest.approx(energy(scores) / (count * (count - 1)), rel=1e-4)
    assert parts.correlated is None
    assert parts.copies == []


def test_more_components_than_are_followed_have_no_variances() -> None:
    parts = layer_of(emscan.audit(head(nn.Linear(4, 4097)), torch.randn(20, 4))).components
    assert (parts.variance, parts.redundancy, parts.correlation_energy, parts.copies) == (None,) * 4


def test_a_scale_in_the_exponent_is_part_of_the_score() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(6, 5)

        def forward(self, x):
            weights = torch.exp2(-self.score(x))
            return weights / weights.sum(-1, keepdim=True)

    model, x = Base(), torch.randn(300, 6)
    row = layer_of(emscan.audit(model, x))
    with torch.no_grad():
        scores = -math.log(2) * model.score(x).double()
    r = scores.softmax(-1)
    assert row.components.load == pytest.approx(r.mean(0).tolist(), rel=1e-4)
    assert row.components.variance == pytest.approx(scores.var(0, correction=0).tolist(), rel=1e-4)


def test_a_sink_of_fixed_energy_does_not_vary() -> None:
    class Sink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            weights = self.score(x).exp()
            return self.out(weights / (1 + weights.sum(-1, keepdim=True)))

    model, x = Sink(), torch.randn(300, 6)
    row = layer_of(emscan.audit(model, x))
    with torch.no_grad():
        scores = torch.cat([model.score(x).double(), torch.zeros(300, 1)], -1)
    r = scores.softmax(-1)
    assert row.alternatives.count == row.components.count == 6
    assert row.components.mass == pytest.approx(r.sum(0).tolist(), rel=1e-4)
    assert row.components.variance == pytest.approx([*scores.var(0, correction=0)[:5].tolist(), 0.0], rel=1e-4)
    assert row.components.redundancy == pytest.approx(energy(scores[:, :5]) / 30, rel=1e-4)


def fitted(model: nn.Module, loss, steps: int = 120) -> nn.Module:
    step = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        step.zero_grad()
        loss(model).backward()
        step.step()
    return model


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
@pytest.mark.parametrize("width", [2, 16])
def test_a_healthy_classifier_has_no_finding(classes: int, width: int) -> None:
    """Two classes included, whose logits are opposite by construction, and inputs of two dimensions."""
    centres = torch.randn(classes, width) * 4
    targets = torch.randint(0, classes, (900,))
    x = centres[targets] + 0.5 * torch.randn(900, width)
    net = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, classes))
    fitted(net, lambda m: F.cross_entropy(m(x), targets))
    report = emscan.audit(net, x, targets=targets)
    row = layer_of(report)
    if classes == 2:
        assert row.components.redundancy > 0.9
    assert row.components.copies == []
    assert findings(report) == {}


def test_uniform_collapse_is_told_though_the_load_is_perfect() -> None:
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight.mul_(0.01)
        layer.bias.zero_()
    report = emscan.audit(head(layer), torch.randn(500, 6))
    assert layer_of(report).responsibility.effective_components == pytest.approx(8, rel=1e-3)
    message = findings(report)["EM201"]
    assert "varies by less than 0.01" in message
    assert "the load looks fine" in message
    assert "EM205" not in findings(report)


def test_scores_that_vary_together_are_a_collapse_without_small_variance() -> None:
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1].expand(8, 6) * 5)
        layer.bias.zero_()
    report = emscan.audit(head(layer), torch.randn(500, 6))
    row = layer_of(report)
    assert min(row.components.variance) > 1
    assert row.components.redundancy == pytest.approx(1, rel=1e-4)
    assert "varies by less than" not in findings(report)["EM201"]
    assert "EM205" in findings(report)


def test_small_variance_alone_is_a_collapse() -> None:
    """Where a threshold on information is set to nothing, the variance still tells."""
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight.mul_(0.01)
    limits = emscan.report.document.Thresholds(information=0.0)
    assert "EM201" in findings(emscan.audit(head(layer), torch.randn(500, 6), thresholds=limits))


class Mixture(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.mu, self.log_pi = nn.Parameter(torch.randn(count, width) * 2), nn.Parameter(torch.zeros(count))

    def forward(self, x):
        squares = ((x.unsqueeze(-2) - self.mu) ** 2).sum(-1)
        return (self.log_pi.log_softmax(-1) - 0.5 * squares).logsumexp(-1)


def test_copies_share_a_load_that_looks_even() -> None:
    centres = torch.randn(6, 4) * 3
    x = centres[torch.randint(0, 6, (600,))] + torch.randn(600, 4)
    model = Mixture(6, 4)
    with torch.no_grad():
        model.mu.copy_(centres)
    fitted(model, lambda m: -m(x).mean(), 40)
    assert findings(emscan.audit(model, x)) == {}
    with torch.no_grad():
        model.mu[4] = model.mu[1]
        model.log_pi[4] = model.log_pi[1] - 0.5
        model.mu[5] = model.mu[1] + 1e-3
    report = emscan.audit(model, x)
    row = next(r for r in report.layers if r.mechanism == "softmax" and r.alternatives.kind == "prototypes")
    assert row.components.copies == [[1, 4, 5]]
    assert not row.components.starved
    finding = next(f for f in report.findings if f.rule == "EM205")
    assert finding.components == [4, 5]
    assert "2 of 6 prototypes copy another one (1 = 4 = 5); they share its load" in finding.message


def test_a_mixture_far_from_its_data_is_not_called_redundant() -> None:
    """Far out, |z|^2 dominates every log-density: the scores correlate, the responsibilities do not."""
    model, x = Mixture(6, 4), torch.randn(500, 4) * 2
    with torch.no_grad():
        model.mu[:, :] = torch.randn(6, 4)
    x[:, 3] += 30 * torch.randn(500)
    with torch.no_grad():
        model.mu[:, 3] = 0
    row = next(r for r in emscan.audit(model, x).layers if r.alternatives and r.alternatives.kind == "prototypes")
    assert row.components.redundancy > 0.9
    assert row.components.copies == []


def test_pages_say_why_load_does_not_show_it() -> None:
    from emscan.rules import RULES

    for code in CODES:
        assert "load alone does not show it" in RULES[code].page.replace("Load", "load")
