"""Routers: load over all choices, posterior, dead and starved experts, against float64 from the scores alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan
from emscan.report.document import Layer, Report
from tests.measure.router_forms import (
    DEAD,
    FORMS,
    RUNS,
    SECOND,
    STARVED,
    K,
    Mixture,
    planted_scores,
    tokens_for,
)


def router(report: Report) -> Layer:
    rows = [layer for layer in report.layers if layer.alternatives and layer.alternatives.kind == "experts"]
    assert len(rows) == 1, [(row.name, row.composition) for row in rows]
    assert rows[0].mechanism == "truncation"
    assert rows[0].components is not None
    assert rows[0].responsibility is not None
    return rows[0]


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def agrees(row: Layer, chosen: Tensor, r: Tensor, rel: float = 1e-4) -> None:
    """Compare a row with what was chosen, of any shape, and the posterior before truncation (n, K), in float64."""
    count = r.shape[-1]
    times = torch.bincount(chosen.flatten(), minlength=count).double()
    load, soft, h = times / times.sum(), r.mean(0), entropy(r)
    parts, spread = row.components, row.responsibility
    near = {"rel": rel, "abs": 1e-6}
    assert row.alternatives.count == parts.count == count
    assert parts.load == pytest.approx(load.tolist(), rel=1e-9)
    assert parts.soft_load == pytest.approx(soft.tolist(), **near)
    assert parts.dead == (times == 0).nonzero().flatten().tolist()
    assert parts.starved == ((load < 0.01 / count) & (times > 0)).nonzero().flatten().tolist()
    assert spread.competitions == len(r)
    assert spread.max_violation == pytest.approx(float(load.max()) * count - 1, rel=1e-6, abs=1e-9)
    assert spread.load_entropy == pytest.approx(float(entropy(load)), rel=1e-6, abs=1e-9)
    assert spread.effective_components == pytest.approx(math.exp(float(entropy(load))), rel=1e-6)
    assert spread.entropy.mean == pytest.approx(float(h.mean()), **near)
    assert spread.entropy.max == pytest.approx(float(h.max()), **near)
    assert spread.normalized_entropy == pytest.approx(float(h.mean()) / math.log(count), **near)
    assert spread.information == pytest.approx(float(entropy(soft) - h.mean()), rel=10 * rel, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", ["loop", "dense"])
def test_every_way_to_choose(form: str, run: str) -> None:
    torch.manual_seed(0)
    scores = planted_scores()
    model = Mixture(FORMS[form].route, RUNS[run]())
    row = router(emscan.audit(model, tokens_for(scores)))
    chosen = FORMS[form].choose(scores.double())
    assert DEAD not in chosen
    agrees(row, chosen, FORMS[form].posterior(scores.double()))
    assert row.responsibility.dropped is None


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("form", ["softmax, top-k", "top-k, softmax", "sigmoid, biased choice"])
def test_every_way_to_run(run: str, form: str) -> None:
    torch.manual_seed(0)
    scores = planted_scores()
    row = router(emscan.audit(Mixture(FORMS[form].route, RUNS[run](), shared=True), tokens_for(scores)))
    agrees(row, FORMS[form].choose(scores.double()), FORMS[form].posterior(scores.double()))


def test_second_choices_count() -> None:
    """An expert that is only ever second carries a quarter of the load here; another peer would call it dead."""
    torch.manual_seed(0)
    scores = planted_scores()
    row = router(emscan.audit(Mixture(FORMS["softmax, top-k"].route, RUNS["loop"]()), tokens_for(scores)))
    assert row.components.dead == [DEAD]
    assert row.components.load[SECOND] == pytest.approx(0.25, abs=1e-3)
    assert SECOND not in row.components.starved


def _masked_below_the_kth(z: Tensor) -> Tensor:
    return z.masked_fill(z < z.topk(2, -1).values[:, -1:], float("-inf")).softmax(-1)


def _masked_by_the_kth_value(z: Tensor) -> Tensor:
    return torch.where(z >= z.kthvalue(K - 1, -1, keepdim=True).values, z.softmax(-1), 0.0)


def _equal_to_the_maximum(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return p * (p == p.amax(-1, keepdim=True))


def _times_a_mask(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return p * F.one_hot(p.topk(2, -1).indices, K).sum(1)


class Weighted(nn.Module):
    """Weights of all experts, exactly zero where one is not chosen, on all their outputs; a balance loss beside it."""

    def __init__(self, weigh) -> None:
        super().__init__()
        self.gate = nn.Linear(20, K, bias=False)
        self.up = nn.Parameter(torch.randn(K, 20, 20) * 0.2)
        self.weigh = weigh
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(K, 20))

    def forward(self, x):
        z = self.gate(x)
        p = z.softmax(-1)
        balance = (F.one_hot(p.argmax(-1), K).float().mean(0) * p.mean(0)).sum() * K
        return torch.einsum("ne,nef->nf", self.weigh(z), torch.einsum("nd,efd->nef", x, self.up)), balance


@pytest.mark.parametrize(
    ("weigh", "k"),
    [(_masked_below_the_kth, 2), (_masked_by_the_kth_value, 2), (_equal_to_the_maximum, 1), (_times_a_mask, 2)],
    ids=lambda part: part.__name__.strip("_") if callable(part) else str(part),
)
def test_a_mask_chooses(weigh, k: int) -> None:
    torch.manual_seed(0)
    scores = planted_scores(600)
    row = router(emscan.audit(Weighted(weigh), tokens_for(scores)))
    agrees(row, scores.topk(k, -1)[1], scores.double().softmax(-1))


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 8 // 2), (64, 6), (256, 8)])
def test_balance_is_judged_alike_for_every_number_of_experts(experts: int, k: int) -> None:
    """Perfect balance but for one starved expert and one dead one: the same findings for 8 and 256 experts."""
    torch.manual_seed(0)
    tokens = 1280
    order = torch.arange(tokens)[:, None] + torch.arange(k)[None]
    live = torch.tensor([e for e in range(experts) if e not in {DEAD, STARVED}])
    chosen = live[order % len(live)]
    scores = torch.full((tokens, experts), -2.0).scatter(1, chosen, 2.0 + torch.rand(tokens, k))
    scores[5, STARVED] = 5.0
    model = Mixture(lambda m, z: z.softmax(-1).topk(k, -1), RUNS["dense"](), experts, experts + 4)
    report = emscan.audit(model, tokens_for(scores, experts + 4))
    row = router(report)
    agrees(row, scores.topk(k, -1)[1], scores.double().softmax(-1))
    assert row.components.dead == [DEAD]
    assert {f.rule for f in report.findings} & {"EM105", "EM106", "EM202"} == (
        {"EM105", "EM106"} if row.components.starved else {"EM105"}
    )
    assert row.components.starved == ([STARVED] if 1 / (tokens * k) < 0.01 / experts else [])


@pytest.mark.parametrize("form", ["softmax, top-k", "groups by their best two, bias", "best, then best of the rest"])
def test_any_batch_size_gives_the_same(form: str) -> None:
    torch.manual_seed(0)
    x = tokens_for(planted_scores())
    model = Mixture(FORMS[form].route, RUNS["loop"]())
    whole, parts = (router(emscan.audit(model, x, batch_size=size)) for size in (None, 64))
    assert whole.components.load == parts.components.load
    assert whole.components.dead == parts.components.dead
    assert whole.components.soft_load == pytest.approx(parts.components.soft_load, rel=1e-6)
    assert whole.responsibility.entropy.mean == pytest.approx(parts.responsibility.entropy.mean, rel=1e-6)


def test_batches_that_wake_other_experts() -> None:
    """The first batch wakes a few experts only: those of later ones count all the same."""
    torch.manual_seed(0)
    scores = planted_scores()
    order = scores.argmax(-1).argsort()
    model = Mixture(FORMS["softmax, top-k"].route, RUNS["loop"]())
    row = router(emscan.audit(model, tokens_for(scores)[order], batch_size=100))
    agrees(row, scores.topk(2, -1)[1], scores.double().softmax(-1))


# ---- capacity ------------------------------------------------------------------------------------------------------
CAPACITY = 180


class Limited(nn.Module):
    """Top-2 of eight experts, each taking at most so many assignments; ``dispatch`` runs them."""

    def __init__(self, dispatch, k: int = 2, capacity: int = CAPACITY) -> None:
        super().__init__()
        self.gate = nn.Linear(20, K, bias=False)
        self.up = nn.Parameter(torch.randn(K, 20, 20) * 0.2)
        self.dispatch, self.k, self.capacity = dispatch, k, capacity
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(K, 20))

    def forward(self, x):
        w, i = self.gate(x).softmax(-1).topk(self.k, -1)
        return self.dispatch(self, x, w, i)


def _slots(m, x, w, i):
    """A dispatch tensor (token, expert, slot), as in GShard."""
    out = torch.zeros_like(x)
    before = torch.zeros(K)
    for j in range(m.k):
        mask = F.one_hot(i[:, j], K).float()
        place = (mask.cumsum(0) - 1 + before) * mask
        before = before + mask.sum(0)
        mask = mask * (place < m.capacity)
        slot = F.one_hot((place * mask).sum(-1).long(), m.capacity).float()
        send = mask.unsqueeze(-1) * slot.unsqueeze(1)
        h = torch.einsum("ecd,efd->ecf", torch.einsum("nec,nd->ecd", send, x), m.up)
        out = out + torch.einsum("nec,ecf->nf", send * w[:, j, None, None], h)
    return out


def _integer_mask(m, x, w, i):
    """A mask of assignments times whether they are within the limit, as in Switch."""
    mask = F.one_hot(i, K).sum(1)
    mask = mask * (torch.cumsum(mask, 0) <= m.capacity)
    h = torch.einsum("nd,efd->nef", x, m.up)
    full = torch.zeros(len(x), K).scatter(1, i, w)
    return torch.einsum("ne,nef->nf", full * mask, h)


def _kept_rows(m, x, w, i):
    """The place of every assignment in its expert's queue, looked up; those beyond the limit are taken out."""
    flat = i.flatten()
    places = F.one_hot(flat, K).cumsum(0).gather(1, flat[:, None])[:, 0] - 1
    keep = places < m.capacity
    token = torch.arange(len(x)).repeat_interleave(m.k)[keep]
    done = torch.einsum("nfd,nd->nf", m.up[flat[keep]], x[token]) * w.flatten()[keep][:, None]
    return torch.zeros_like(x).index_add(0, token, done)


def _zeroed_weights(m, x, w, i):
    flat = i.flatten()
    places = (F.one_hot(flat, K).cumsum(0) * F.one_hot(flat, K)).sum(-1)
    w = w.masked_fill((places > m.capacity).view_as(w), 0.0)
    return torch.einsum("nkfd,nd,nk->nf", m.up[i], x, w)


DISPATCHES = {f.__name__: f for f in (_slots, _integer_mask, _kept_rows, _zeroed_weights)}


def left_out(chosen: Tensor, capacity: int) -> float:
    times = torch.bincount(chosen.flatten(), minlength=K)
    return float((times - capacity).clamp(min=0).sum()) / chosen.numel()


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("k", [1, 2])
def test_what_capacity_leaves_out(dispatch: str, k: int) -> None:
    torch.manual_seed(0)
    scores = planted_scores(1000)
    row = router(emscan.audit(Limited(DISPATCHES[dispatch], k), tokens_for(scores)))
    chosen = scores.topk(k, -1)[1]
    assert left_out(chosen, CAPACITY) > 0.05
    assert row.responsibility.dropped == pytest.approx(left_out(chosen, CAPACITY), abs=1e-9)
    agrees(row, chosen, scores.double().softmax(-1))  # the load is of what was chosen, before dropping


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_room_for_all(dispatch: str) -> None:
    torch.manual_seed(0)
    row = router(emscan.audit(Limited(DISPATCHES[dispatch], capacity=5000), tokens_for(planted_scores(300))))
    assert row.responsibility.dropped == 0


# ---- which axis --------------------------------------------------------------------------------------------------
class Axis(nn.Module):
    """``scores``: input -> scores with experts along ``axis``; every size may equal the number of experts."""

    def __init__(self, gate: nn.Module, scores, axis: int, width: int) -> None:
        super().__init__()
        self.gate, self.scores, self.axis = gate, scores, axis
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(K))

    def forward(self, x):
        p = self.scores(self.gate, x).softmax(self.axis)
        w, i = p.topk(2, self.axis)
        full = torch.zeros_like(p).scatter(self.axis, i, w).movedim(self.axis, -1)
        h = torch.stack([expert(x) for expert in self.experts], -2)
        return (full.unsqueeze(-1) * h).sum(-2)


AXES = {
    "last": (nn.Linear, lambda g, x: g(x), -1, (3, 5)),
    "first": (nn.Linear, lambda g, x: g(x).movedim(-1, 0), 0, (3, 5)),
    "middle": (nn.Linear, lambda g, x: g(x).transpose(1, 2), 1, (3, 5)),
    "convolution": (lambda d, k: nn.Conv1d(d, k, 1), lambda g, x: g(x.transpose(1, 2)), 1, (3, 5)),
    "as many samples": (nn.Linear, lambda g, x: g(x).movedim(-1, 0), 0, (K, 5)),
    "as many positions": (nn.Linear, lambda g, x: g(x).transpose(1, 2), -2, (3, K)),
    "as many of both": (nn.Linear, lambda g, x: g(x).transpose(1, 2), -2, (K, K)),
}


@pytest.mark.parametrize("case", AXES)
@pytest.mark.parametrize("width", [K, 13])
def test_the_axis_of_the_experts_comes_from_the_dataflow(case: str, width: int) -> None:
    torch.manual_seed(0)
    make, scores, axis, lead = AXES[case]
    model, x = Axis(make(width, K), scores, axis, width), torch.randn(*lead, width)
    z = scores(model.gate, x).detach().movedim(axis, -1).reshape(-1, K).double()
    row = router(emscan.audit(model, x))
    agrees(row, z.topk(2, -1)[1], z.softmax(-1))


@pytest.mark.parametrize("width", [K, 12])
def test_latents_under_a_mask_are_no_experts(width: int) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(width, K), nn.Linear(K, width)

        def forward(self, x):
            z = self.encode(x)
            mask = torch.zeros_like(z).scatter(-1, z.topk(2, -1).indices, 1.0)
            return self.decode(z * mask)

    torch.manual_seed(0)
    rows = emscan.audit(Sparse(), torch.randn(40, width)).layers
    assert [row.alternatives.kind for row in rows if row.mechanism == "truncation"] == ["latents"]


def test_tokens_that_are_picked_out_are_no_experts() -> None:
    """Mixture of depths: a score per token chooses which tokens a block sees."""

    class Depths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.block = nn.Linear(K, 1), nn.Linear(K, K)

        def forward(self, x):
            w, i = self.score(x).squeeze(-1).topk(3, -1)
            where = i.unsqueeze(-1).expand(-1, -1, K)
            return x.scatter_add(1, where, self.block(x.gather(1, where)) * w.sigmoid().unsqueeze(-1))

    torch.manual_seed(0)
    rows = emscan.audit(Depths(), torch.randn(6, K, K)).layers
    found = [row for row in rows if row.mechanism == "truncation"]
    assert [row.alternatives.kind for row in found] == ["positions"]
    assert all(row.responsibility is None or row.responsibility.max_violation is None for row in found)
