"""Objectives: what they add, losses inside the model, double normalization, softmax over the batch, r minus target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan
from emscan.classify.evidence import gather
from emscan.classify.labels import residual_error
from tests.classify.basic_cases import Fn
from tests.classify.conftest import look_at

K = 12
X = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
Y = torch.arange(40) % K


def flagged(found: Any) -> list[str]:
    return sorted({flag for row in found.rows for site in row.sites for flag in site.flags})


def labels(found: Any) -> list[str]:
    return [row.composition for row in found.rows if row.site is not None]


# ---- normalized twice ---------------------------------------------------------------------------
NORMALIZED = {
    "softmax": lambda z: z.softmax(-1),
    "softmin": lambda z: F.softmin(z, -1),
    "exp_of_log_softmax": lambda z: z.log_softmax(-1).exp(),
    "hand_written": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    "minus_log_sum_exp": lambda z: (z - z.logsumexp(-1, keepdim=True)).exp(),
    "einsum": lambda z: torch.einsum("nk,n->nk", z.exp(), 1 / z.exp().sum(-1)),
    "matmul_with_ones": lambda z: z.exp() / (z.exp() @ z.new_ones(K, 1)),
    "scaled_mean": lambda z: z.exp() / (z.exp().mean(-1, keepdim=True) * K),
    "view_of_softmax": lambda z: z.view(-1, 3, 4).flatten(1).softmax(-1).unsqueeze(1).squeeze(1),
    "clamped": lambda z: z.softmax(-1).clamp_min(1e-7),
    "kernel": lambda z: (1 / (1 + z * z)) / (1 / (1 + z * z)).sum(-1, keepdim=True),
}
LOGARITHMS = {
    "log_softmax": lambda z: z.log_softmax(-1),
    "log_of_softmax": lambda z: z.softmax(-1).log(),
    "log_of_softmax_guarded": lambda z: (z.softmax(-1) + 1e-9).log(),
    "log_of_clamped_softmax": lambda z: z.softmax(-1).clamp_min(1e-7).log(),
    "minus_log_sum_exp": lambda z: z - z.logsumexp(-1, keepdim=True),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_cross_entropy_on_what_is_normalized_is_an_error(name: str) -> None:
    report = emscan.audit(Fn(NORMALIZED[name]), X, objective="cross-entropy", targets=Y)
    assert [f.rule for f in report.findings if f.level == "error"] == ["EM002"]
    assert not any("Cross-Entropy" in layer.composition for layer in report.layers)


@pytest.mark.parametrize("name", LOGARITHMS)
def test_log_probabilities_are_read_by_a_likelihood(name: str) -> None:
    report = emscan.audit(Fn(LOGARITHMS[name]), X, objective="cross-entropy", targets=Y)
    assert not [f for f in report.findings if f.level == "error"]
    (row,) = (layer for layer in report.layers if layer.mechanism == "softmax")
    assert row.composition.endswith("+ NLL")


@pytest.mark.parametrize("name", NORMALIZED)
def test_cross_entropy_inside_the_model_on_what_is_normalized_is_an_error(name: str) -> None:
    found = look_at(Fn(lambda z: F.cross_entropy(NORMALIZED[name](z), Y)), (X,))
    assert flagged(found) == ["double-normalization"]


@pytest.mark.parametrize("name", LOGARITHMS)
def test_cross_entropy_inside_the_model_on_log_probabilities_changes_nothing(name: str) -> None:
    assert flagged(look_at(Fn(lambda z: F.cross_entropy(LOGARITHMS[name](z), Y)), (X,))) == []


@pytest.mark.parametrize("name", LOGARITHMS)
def test_a_likelihood_inside_the_model_on_log_probabilities_is_cross_entropy(name: str) -> None:
    found = look_at(Fn(lambda z: F.nll_loss(LOGARITHMS[name](z), Y)), (X,))
    assert flagged(found) == []
    assert labels(found) == ["Linear + Softmax + Cross-Entropy"]


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_likelihood_inside_the_model_on_probabilities_is_an_error(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, K)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.nll_loss(NORMALIZED[name](self.fc(x)), y)

    report = emscan.audit(Net(), {"x": X, "y": Y})
    assert [f.rule for f in report.findings if f.level == "error"] == ["EM003"]


@pytest.mark.parametrize("gate", [torch.sigmoid, lambda z: 1 / (1 + (-z).exp())])
def test_a_sigmoid_under_a_loss_on_logits_is_an_error(gate: Any) -> None:
    half = torch.full((40, K), 0.5)
    assert flagged(look_at(Fn(lambda z: F.binary_cross_entropy_with_logits(gate(z), half)), (X,))) == [
        "double-normalization"
    ]
    assert flagged(look_at(Fn(lambda z: F.binary_cross_entropy_with_logits(z, half)), (X,))) == []
    found = look_at(Fn(lambda z: F.binary_cross_entropy(gate(z), half)), (X,))
    assert (flagged(found), labels(found)) == ([], ["Linear + Sigmoid + BCE"])


def test_other_gates_under_a_loss_on_logits_are_sound() -> None:
    for gate in (torch.tanh, F.silu, F.relu, F.softplus):
        found = look_at(Fn(lambda z, g=gate: F.binary_cross_entropy_with_logits(g(z), torch.ones(40, K))), (X,))
        assert flagged(found) == []


def test_softmax_inside_the_network_is_no_double_normalization() -> None:
    net = nn.Sequential(nn.Linear(16, 8), nn.Softmax(-1), nn.Linear(8, K))
    report = emscan.audit(net, X, targets=Y)
    assert not [f for f in report.findings if f.level == "error"]
    assert [layer.composition for layer in report.layers] == ["Linear + Softmax", "Linear + Softmax + Cross-Entropy"]


# ---- softmax over the batch ---------------------------------------------------------------------
OVER_BATCH = {
    "softmax": lambda z: z.softmax(0),
    "negative_axis": lambda z: F.softmax(z, dim=-z.dim()),
    "module": nn.Softmax(0),
    "softmin": lambda z: F.softmin(z, 0),
    "log_softmax": lambda z: z.log_softmax(0),
    "transposed": lambda z: z.transpose(0, -1).softmax(-1).transpose(0, -1),
    "exp_over_sum": lambda z: z.exp() / z.exp().sum(0, keepdim=True),
    "stabilized": lambda z: (z - z.amax(0)).exp() / (z - z.amax(0)).exp().sum(0),
    "log_sum_exp": lambda z: z - z.logsumexp(0),
    "exp_minus_log_sum_exp": lambda z: (z - torch.logsumexp(z, 0, keepdim=True)).exp(),
    "einsum_sum": lambda z: z.exp() / torch.einsum("n...->...", z.exp()),
    "einsum_product": lambda z: torch.einsum("n...k,...k->n...k", z.exp(), 1 / z.exp().sum(0)),
    "einsum_with_ones": lambda z: z.exp() / torch.einsum("n...,n->...", z.exp(), z.new_ones(len(z))),
    "ones_at_it": lambda z: z.exp() / (z.new_ones(1, len(z)) @ z.exp().flatten(1)).view(1, *z.shape[1:]),
    "mean": lambda z: z.exp() / (z.exp().mean(0) * len(z)),
}


@pytest.mark.parametrize("shape", [(24, 16), (24, 5, 16), (24, 3, 4, 16)], ids=["vectors", "sequences", "grids"])
@pytest.mark.parametrize("name", OVER_BATCH)
def test_softmax_over_the_batch_is_found(name: str, shape: tuple[int, ...]) -> None:
    report = emscan.audit(Fn(OVER_BATCH[name]), torch.randn(*shape))
    (row,) = (layer for layer in report.layers if layer.mechanism == "softmax")
    assert (row.alternatives.kind, row.alternatives.count) == ("batch", 24)
    assert [f.rule for f in report.findings if f.level == "error"] == ["EM001"]
    assert row.evidence.gradient_error <= row.evidence.tolerance


class Weighted(nn.Module):
    """Layers over a sequence, then every step weighted by a softmax over the first axis."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.score = layers, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        h = h[0] if isinstance(h, tuple) else h
        return self.score(h).softmax(0) * h


@pytest.mark.parametrize(
    ("layers", "batch"),
    [
        (nn.TransformerEncoderLayer(8, 2, 16), False),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), True),
        (nn.LSTM(8, 8), False),
        (nn.LSTM(8, 8, batch_first=True), True),
        (nn.GRU(8, 8), False),
        (nn.Linear(8, 8), True),
    ],
)
def test_an_axis_that_attention_or_recurrence_runs_along_is_no_batch(layers: nn.Module, batch: bool) -> None:
    found = look_at(Weighted(layers), (torch.randn(7, 4, 8),))
    kinds = [row.site.kind for row in found.rows if row.mechanism == "softmax" and row.composition != "Attention"]
    assert kinds == (["batch"] if batch else ["positions"])


def test_pooling_a_bag_of_instances_is_no_softmax_over_a_batch() -> None:
    found = look_at(Fn(lambda h: h.sum(-1, keepdim=True).softmax(0).T @ h), (X,))
    assert [row.site.kind for row in found.rows if row.mechanism == "softmax"] == ["positions"]


def test_a_contrastive_loss_has_no_persistent_classes() -> None:
    net = Fn(lambda z: F.cross_entropy(F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).T, torch.arange(40)))
    (row,) = (row for row in look_at(net, (X,)).rows if row.mechanism == "softmax")
    assert not row.site.persistent
    assert row.site.kind != "classes"


# ---- losses that the model computes -----------------------------------------------------------------
class WithLoss(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(16, K), first

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        z = self.fc(x)
        if labels is None:
            return z
        loss = F.cross_entropy(z.float().view(-1, K), labels.view(-1))
        return (loss, z) if self.first else {"logits": z, "loss": loss}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("objective", ["auto", "cross-entropy"])
def test_a_loss_on_the_output_inside_the_model_is_one_row(first: bool, objective: str) -> None:
    report = emscan.audit(WithLoss(first), {"x": X, "labels": Y}, objective=objective)
    assert [layer.composition for layer in report.layers] == ["Linear + Softmax + Cross-Entropy"]
    assert report.probe.objective.startswith("cross-entropy")
    if objective == "auto":
        assert report.probe.objective == "cross-entropy (computed by the model)"
        beside = emscan.audit(WithLoss(first).eval(), X, targets=Y)
        assert report.layers[0].responsibility.calibration.targets == len(X)
        assert beside.layers[0].responsibility.calibration.targets == len(X)


def test_what_the_model_ignores_does_not_count() -> None:
    net = WithLoss(True)
    labels = torch.where(torch.arange(40) % 4 == 0, -100, Y)
    report = emscan.audit(net, {"x": X, "labels": labels})
    assert report.layers[0].responsibility.calibration.targets == 30


# ---- r minus target -----------------------------------------------------------------------------
def errors(module: nn.Module, objective: str, targets: Tensor, x: Tensor = X) -> tuple[float, float]:
    found = look_at(module, (x,), objective, targets)
    site = found.objective.through
    assert site is not None
    assert found.objective.targets is not None
    alone, told = (gather(site, found.trace, 16.0, t) for t in (None, found.objective.targets))
    error = residual_error(site, found.objective.targets)
    assert error is not None
    assert told.gradient_error == max(alone.gradient_error, error)
    return error, told.tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ends", ["logits", "log_softmax", "log_sum_exp"])
def test_the_gradient_of_cross_entropy_is_r_minus_target(ends: str, dtype: torch.dtype) -> None:
    tail = {
        "logits": lambda z: z,
        "log_softmax": LOGARITHMS["log_softmax"],
        "log_sum_exp": LOGARITHMS["minus_log_sum_exp"],
    }
    error, tolerance = errors(Fn(tail[ends]).to(dtype), "cross-entropy", Y, X.to(dtype))
    assert error <= tolerance


def test_the_gradient_over_a_class_axis_in_the_middle() -> None:
    net = nn.Conv2d(3, 5, 1)
    x, y = torch.randn(2, 3, 6, 6), torch.randint(0, 5, (2, 6, 6))
    y[0, :2] = -100
    error, tolerance = errors(net, "cross-entropy", y, x)
    assert error <= tolerance
    shuffled = look_at(net, (x,), "cross-entropy", y).objective.through
    assert shuffled.axes == (-3,)


@pytest.mark.parametrize("tail", [lambda z: z, torch.sigmoid], ids=["logits", "sigmoid"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_binary_cross_entropy_is_r_minus_target(tail: Any, soft: bool) -> None:
    y = torch.rand(40, K, generator=torch.Generator().manual_seed(1))
    error, tolerance = errors(Fn(tail), "bce", y if soft else y.round())
    assert error <= tolerance


def test_targets_that_are_off_are_seen() -> None:
    """The identity is checked against the numbers of the run: a softmax at another temperature does not pass."""
    found = look_at(Fn(lambda z: z.log_softmax(-1)), (X,), "cross-entropy", Y)
    site = found.objective.through
    site.emitted.tensor = (site.energies.tensor / 2).log_softmax(-1)
    assert residual_error(site, Y) > 1e-2


def test_the_gradient_of_free_energy_is_r() -> None:
    found = look_at(nn.Linear(16, K), (X,), "free-energy")
    (site,) = found.objective.added
    evidence = gather(site, found.trace, 16.0)
    assert evidence.gradient_error <= evidence.tolerance
    e = site.energies.tensor.detach().double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(-torch.logsumexp(-e, -1).sum(), e)
    torch.testing.assert_close(gradient, (-e).softmax(-1).detach())
