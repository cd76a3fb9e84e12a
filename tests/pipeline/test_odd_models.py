"""Networks that are odd but real: what the rules were not written for must not be called something else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import emscan


class ByHand(nn.Module):
    """Looks a score up by what the input names: a label, an action."""

    def __init__(self, loss) -> None:
        super().__init__()
        self.scores, self.loss = nn.Linear(16, 5), loss

    def forward(self, x, y):
        return self.loss(self.scores(x), y[:, None])


LOSSES = {
    "cross-entropy": (lambda z, y: -z.log_softmax(-1).gather(1, y).mean(), "softmax"),
    "focal": (lambda z, y: _focal(z.log_softmax(-1).gather(1, y)), "softmax"),
    "log-sum-exp less score": (lambda z, y: (z.logsumexp(-1, keepdim=True) - z.gather(1, y)).mean(), "softmax"),
    "clamped label": (lambda z, y: -z.log_softmax(-1).gather(1, y.clamp(min=0)).mean(), "softmax"),
    "value of an action": (lambda z, y: z.gather(1, y), "affine"),
}


def _focal(chosen):
    return -((1 - chosen.exp()) ** 2 * chosen).mean()


@pytest.mark.parametrize("name", LOSSES)
def test_a_score_that_the_input_names_is_no_router(name):
    loss, mechanism = LOSSES[name]
    torch.manual_seed(0)
    layers = emscan.audit(ByHand(loss), (torch.randn(60, 16), torch.randint(0, 5, (60,)))).to_dict()["layers"]
    assert [layer["mechanism"] for layer in layers] == [mechanism]
    assert layers[0]["verdict"] == ("em" if mechanism == "softmax" else "none")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def scores(self, x):
        q, k = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k))
        return 3 * q @ k.transpose(-1, -2) / math.sqrt(8)

    def forward(self, x):
        return self.scores(x).softmax(-1) @ self.v(x).unflatten(-1, (2, 8)).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(3, 30, 30), (30, 3, 30), (30, 30, 3)])
def test_quantiles_do_not_depend_on_which_length_comes_first(lengths):
    torch.manual_seed(0)
    batches = {n: torch.randn(4, n, 16) for n in lengths}
    model = Attention()
    report = emscan.audit(model, iter([batches[n] for n in lengths])).to_dict()
    row = next(layer for layer in report["layers"] if layer["verdict"] == "em")
    with torch.no_grad():
        r = [model.double().scores(batches[n].double()).softmax(-1) for n in lengths]
    h = torch.cat([-(p * p.log()).sum(-1).flatten() for p in r])
    for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        true = float(h.quantile(q, interpolation="lower"))
        assert row["responsibility"]["entropy"][name] == pytest.approx(true, abs=math.log(30) / 4096)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 5)

    def forward(self, x, scale=None):
        z = self.scores(x)
        return (z if scale is None else z * scale[:, :5]).softmax(-1)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_list_of_batches_fills_no_parameter_that_has_a_default(parts):
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(24, 8)
    whole, cut = (emscan.audit(model, given).to_dict() for given in (x, list(x.chunk(parts))))
    assert (cut["probe"]["samples"], cut["probe"]["batches"]) == (24, parts)
    entropies = [report["layers"][0]["responsibility"]["entropy"]["mean"] for report in (whole, cut)]
    assert entropies[1] == pytest.approx(entropies[0], rel=1e-4)
