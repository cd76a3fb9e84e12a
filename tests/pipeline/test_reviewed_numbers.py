"""Numbers that a hostile reader found wrong: routers that keep all, exploding scores, padding, losses in forward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import emscan
from emscan.errors import ProbeError


def audited(model, inputs, **options):
    return emscan.audit(model, inputs, **options).to_dict()


def competitions(report):
    return [row for row in report["layers"] if row["mechanism"] in {"softmax", "kernel", "truncation", "selection"}]


def codes(report):
    return {finding["rule"] for finding in report["findings"]}


# ---- routers that keep every expert ---------------------------------------------------------------
class Mixture(nn.Module):
    """Four experts, of which all four are kept."""

    def __init__(self, weigh) -> None:
        super().__init__()
        self.router, self.weigh = nn.Linear(16, 4), weigh
        self.experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))
        with torch.no_grad():
            self.router.weight.mul_(3)
            self.router.bias.copy_(torch.tensor([2.0, 0.0, -1.0, 1.0]))

    def forward(self, x):
        weights, chosen = self.weigh(self.router(x))
        if chosen is None:
            return torch.einsum("ne,end->nd", weights, torch.stack([expert(x) for expert in self.experts]))
        out = x.new_zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def softmax_first(z):
    weights, chosen = z.softmax(-1).topk(4)
    return weights / weights.sum(-1, keepdim=True), chosen


def topk_first(z):
    scores, chosen = z.topk(4)
    return scores.softmax(-1), chosen


def sigmoids(z):
    weights, chosen = z.sigmoid().topk(4)
    return weights / weights.sum(-1, keepdim=True), chosen


def dense_mask(z):
    r = z.softmax(-1)
    weights, chosen = r.topk(4)
    masked = torch.zeros_like(r).scatter(-1, chosen, weights)
    return masked / masked.sum(-1, keepdim=True), None


@pytest.mark.parametrize("weigh", [softmax_first, topk_first, sigmoids, dense_mask])
def test_a_router_that_keeps_every_expert_has_its_load_by_expert(weigh):
    torch.manual_seed(0)
    model, x = Mixture(weigh), torch.randn(120, 16)
    (row,) = competitions(audited(model, x))
    kernel = weigh is sigmoids
    assert (row["verdict"], row["mechanism"]) == ("em", "kernel" if kernel else "softmax")
    assert row["alternatives"] == {"kind": "experts", "count": 4, "axis": -1, "persistent": True}
    assert row["note"] is None
    z = model.router(x).double().detach()
    r = z.sigmoid() / z.sigmoid().sum(-1, keepdim=True) if kernel else z.softmax(-1)
    entropy = -(r * r.log()).sum(-1).mean()
    load = r.mean(0)
    assert row["components"]["load"] == pytest.approx(load.tolist(), rel=1e-4)
    information = float(-(load * load.log()).sum() - entropy)
    assert row["responsibility"]["information"] == pytest.approx(information, rel=1e-3)
    assert row["evidence"]["gradient_error"] < 1e-6


class ExpertChoice(Mixture):
    """Every expert picks a quarter of the tokens."""

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).t().topk(len(x) // 4)
        out = x.new_zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            out = out.index_add(0, chosen[number], expert(x[chosen[number]]) * weights[number, :, None])
        return out


def test_experts_that_choose_tokens_still_compete_for_them():
    torch.manual_seed(0)
    model, x = ExpertChoice(None), torch.randn(120, 16)
    report = audited(model, x)
    softmax, picked = competitions(report)
    r = model.router(x).double().softmax(-1).detach()
    assert (softmax["mechanism"], softmax["alternatives"]["kind"]) == ("softmax", "experts")
    assert softmax["components"]["load"] == pytest.approx(r.mean(0).tolist(), rel=1e-4)
    assert (picked["mechanism"], picked["alternatives"]["kind"]) == ("truncation", "positions")
    assert "EM001" not in codes(report)


# ---- scores that are far apart --------------------------------------------------------------------
class Attention(nn.Module):
    """Two heads, written out; ``hide``: what is done to the scores, with a mask of the keys in sight."""

    def __init__(self, hide=None, scale=1.0, layers=1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(layers))
        self.hide, self.scale = hide, scale

    def forward(self, x, mask=None):
        for query, key, value, out in self.layers:
            q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, key, value))
            scores = self.scale * (q @ k.transpose(-1, -2))
            length = x.shape[1]
            shown = torch.ones(length, length, dtype=torch.bool).tril()
            shown = shown if mask is None else shown & mask[:, None, None]
            scores = scores if self.hide is None else self.hide(scores, shown)
            x = out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


def fill(scores, shown):
    return scores.masked_fill(~shown, -math.inf)


def add(scores, shown):
    return scores + torch.zeros(shown.shape).masked_fill(~shown, -math.inf)


def bias(scores, shown):
    return scores - torch.arange(shown.shape[-1]).float()


@pytest.mark.parametrize("hide", [None, fill, add, bias])
def test_keys_far_below_the_best_are_in_sight_where_nothing_has_masked_them(hide):
    torch.manual_seed(0)
    (row,) = competitions(audited(Attention(hide, scale=3e4), torch.randn(6, 9, 16)))
    assert row["responsibility"]["competitions"] == 6 * 2 * 9
    assert row["responsibility"]["hard_fraction"] > 0.9


def test_a_finite_mask_still_hides():
    torch.manual_seed(0)
    x, told = torch.randn(6, 9, 16), []
    for value in (-math.inf, -1e4, torch.finfo(torch.float32).min):
        model = Attention(lambda s, shown, value=value: s + torch.where(shown, 0.0, value))
        torch.manual_seed(1)
        for part in model.parameters():
            nn.init.normal_(part, std=0.3)
        (row,) = competitions(audited(model, x))
        told.append(row["responsibility"]["normalized_entropy"])
    assert told[1:] == pytest.approx(told[:1] * 2, rel=1e-6)


# ---- rows with nothing in sight -------------------------------------------------------------------
@pytest.mark.parametrize("layers", [1, 2])
def test_queries_with_no_key_in_sight_are_no_evidence_against_the_rest(layers):
    torch.manual_seed(0)
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[0, :4] = mask[3, :2] = False
    report = audited(Attention(fill, layers=layers), (torch.randn(6, 9, 16), mask))
    assert "EM401" not in codes(report)
    assert all(row["evidence"]["gradient_error"] < 1e-6 for row in competitions(report))
    assert ("EM301" in codes(report)) == (layers == 2)  # there, NaN values reach queries that count


def test_what_is_nowhere_finite_is_no_evidence():
    head = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    assert {"EM301", "EM401"} <= codes(audited(head, torch.full((6, 4), math.nan)))


# ---- losses in forward ----------------------------------------------------------------------------
class Trained(nn.Module):
    def __init__(self, loss) -> None:
        super().__init__()
        self.scores, self.loss = nn.Linear(16, 5), loss

    def forward(self, x, labels):
        z = self.scores(x)
        return self.loss(z, labels), z


LOSSES = {
    "fused": F.cross_entropy,
    "likelihood": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "lookup": lambda z, y: -z.log_softmax(-1).gather(1, y[:, None]).mean(),
    "difference": lambda z, y: (z.logsumexp(-1) - z.gather(1, y[:, None]).squeeze(1)).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_in_forward_is_the_objective(name):
    torch.manual_seed(0)
    model, x, y = Trained(LOSSES[name]), torch.randn(80, 16), torch.randint(0, 5, (80,))
    report = audited(model, {"x": x, "labels": y})
    assert report["probe"]["objective"] == "cross-entropy (computed by the model)"
    (row,) = competitions(report)
    found = row["responsibility"]["calibration"]
    r = model.scores(x).double().softmax(-1).detach()
    assert found["targets"] == 80
    assert found["accuracy"] == pytest.approx(float((r.argmax(-1) == y).double().mean()))
    assert found["confidence"] == pytest.approx(float(r.amax(-1).mean()), rel=1e-5)


class Contrast(nn.Module):
    def __init__(self, loss) -> None:
        super().__init__()
        self.embed, self.loss = nn.Linear(16, 8), loss

    def forward(self, a, b):
        scores = F.normalize(self.embed(a), dim=-1) @ F.normalize(self.embed(b), dim=-1).t() / 0.1
        return self.loss(scores, torch.arange(len(a)))


@pytest.mark.parametrize("name", ["fused", "likelihood"])
def test_samples_are_the_alternatives_of_a_contrastive_loss_and_no_bug(name):
    torch.manual_seed(0)
    report = audited(Contrast(LOSSES[name]), (torch.randn(40, 16), torch.randn(40, 16)))
    (row,) = competitions(report)
    assert (row["verdict"], row["alternatives"]["kind"], row["alternatives"]["persistent"]) == ("em", "batch", False)
    assert "in-batch contrastive loss" in row["note"]
    assert "EM001" not in codes(report)


def test_a_softmax_over_the_batch_is_a_bug_still():
    assert "EM001" in codes(audited(nn.Sequential(nn.Linear(6, 4), nn.Softmax(0)), torch.randn(20, 6)))


# ---- redundancy -----------------------------------------------------------------------------------
class Scores(nn.Module):
    """Softmax over scores w v_k + noise W x, with a common term of all scores."""

    def __init__(self, common: float, along: float, own: float) -> None:
        super().__init__()
        self.shared, self.line, self.own = nn.Linear(16, 1), nn.Linear(16, 1), nn.Linear(16, 8)
        self.places = nn.Parameter(torch.linspace(-3, 3, 8))
        self.sizes = (common, along, own)

    def forward(self, x):
        common, along, own = self.sizes
        return (common * self.shared(x) + along * self.line(x) * self.places + own * self.own(x)).softmax(-1)


@pytest.mark.parametrize(
    ("sizes", "redundant"), [((100.0, 0.0, 1.0), False), ((0.0, 1.0, 0.05), True), ((100.0, 1.0, 0.05), True)]
)
def test_what_is_added_to_all_scores_makes_no_component_redundant(sizes, redundant):
    torch.manual_seed(0)
    model, x = Scores(*sizes), torch.randn(400, 16)
    report = audited(model, x)
    parts = competitions(report)[0]["components"]
    assert parts["redundancy"] > 0.9
    common, along, own = sizes
    with torch.no_grad():
        model.double()
        z = x.double()
        s = common * model.shared(z) + along * model.line(z) * model.places + own * model.own(z)
        related = torch.corrcoef((s - s.mean(1, keepdim=True)).T).square()
    assert parts["redundancy_centred"] == pytest.approx(float(related.sum() - 8) / 56, rel=1e-3)
    said = [finding["message"] for finding in report["findings"] if finding["rule"] == "EM205"]
    assert bool(said) == redundant
    assert not said or f"{parts['redundancy_centred']:.0%} without what all scores share" in said[0]


# ---- lists of batches -----------------------------------------------------------------------------
class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 5)

    def forward(self, x, context=None):
        z = self.scores(x)
        return (z if context is None else z + context.mean()).softmax(-1)


def test_a_list_that_could_be_batches_or_arguments_is_refused_and_a_tuple_is_arguments():
    long, short = torch.randn(4, 9, 8), torch.randn(4, 6, 8)
    with pytest.raises(ProbeError, match="2 batches or 2 arguments"):
        audited(Optional(), [long, short])
    assert audited(Optional(), (long, short))["probe"]["batches"] == 1
    assert audited(Optional(), [(long,), (short,)])["probe"]["batches"] == 2
    assert audited(Optional(), [long, long[:3]])["probe"]["samples"] == 7
