"""What must not decide a verdict: labels among the inputs, what is kept for monitoring, targets made of a posterior."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import emscan


def _rows(model, inputs):
    report = emscan.audit(model, inputs).to_dict()
    assert not [f for f in report["findings"] if f["level"] == "error"]
    return [layer for layer in report["layers"] if layer["verdict"] != "none"]


def _said(row):
    return row["mechanism"], row["statistic"], row["alternatives"]["kind"], row["alternatives"]["count"]


class Scored(nn.Module):
    """Class scores and a loss of them, written by hand."""

    def __init__(self, loss) -> None:
        super().__init__()
        self.scores, self.loss = nn.Linear(16, 5), loss

    def forward(self, x, y):
        return self.loss(self.scores(x), y[:, None])


def _focal(z, y):
    chosen = z.log_softmax(-1).gather(1, y)
    return -((1 - chosen.exp()) ** 2 * chosen).mean()


CROSS_ENTROPIES = {
    "log-share of the label": lambda z, y: -z.log_softmax(-1).gather(1, y).mean(),
    "logarithm of its share": lambda z, y: -z.softmax(-1).log().gather(1, y).mean(),
    "focal": _focal,
    "partition less score": lambda z, y: (z.logsumexp(-1, keepdim=True) - z.gather(1, y)).mean(),
    "squeezed": lambda z, y: (z.logsumexp(-1) - z.gather(1, y).squeeze(1)).mean(),
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropy_by_hand_reads_as_the_operator_does(name):
    torch.manual_seed(0)
    (row,) = _rows(Scored(CROSS_ENTROPIES[name]), (torch.randn(60, 16), torch.randint(0, 5, (60,))))
    assert (row["composition"], row["verdict"]) == ("Linear + Softmax + Cross-Entropy", "em")
    assert (row["alternatives"]["kind"], row["alternatives"]["count"]) == ("classes", 5)
    assert row["evidence"]["gradient_error"] < 1e-5


def test_a_looked_up_share_is_a_softmax_and_no_router():
    torch.manual_seed(0)
    given = (torch.randn(60, 16), torch.randint(0, 5, (60,)))
    (row,) = _rows(Scored(lambda z, y: -z.softmax(-1).gather(1, y).mean()), given)
    assert (row["composition"], row["mechanism"]) == ("Linear + Softmax", "softmax")


class Prototypes(nn.Module):
    """Distances to eight prototypes, and what ``last`` makes of them."""

    def __init__(self, last) -> None:
        super().__init__()
        self.encoder, self.centres = nn.Linear(16, 4), nn.Parameter(torch.randn(8, 4))
        self.register_buffer("usage", torch.zeros(8))
        self.last = last

    def energies(self, x):
        return torch.cdist(self.encoder(x), self.centres).pow(2)

    def forward(self, x):
        return self.last(self, -self.energies(x))


def _kept(model, e):
    model.seen = e.softmax(-1).detach()
    return e.logsumexp(-1)


def _counted(model, e):
    model.usage.mul_(0.9).add_(e.softmax(-1).detach().mean(0) * 0.1)
    return e.logsumexp(-1)


def _without_gradient(model, e):
    partition = e.logsumexp(-1)
    with torch.no_grad():
        model.seen = (e - partition[:, None]).exp()
    return partition


@pytest.mark.parametrize("last", [_kept, _counted, _without_gradient])
def test_a_posterior_kept_for_monitoring_decides_no_statistic(last):
    torch.manual_seed(0)
    (row,) = _rows(Prototypes(last), torch.randn(60, 16))
    assert _said(row) == ("softmax", "log-partition", "prototypes", 8)
    assert row["note"] is None
    assert row["conditions"]["posterior_propagated"]


@pytest.mark.parametrize("winner", [lambda e: e.argmax(-1), lambda e: e.softmax(-1).argmax(-1)])
def test_a_partition_keeps_its_row_beside_the_winner(winner):
    torch.manual_seed(0)
    rows = _rows(Prototypes(lambda _, e: (e.logsumexp(-1), winner(e))), torch.randn(60, 16))
    assert [(row["mechanism"], row["statistic"]) for row in rows] == [
        ("softmax", "log-partition"),
        ("selection", "mode"),
    ]


def _student(e):
    return 1 / (1 - e)


def _turned(w):
    return (w.t() / w.sum(1)).t()


def _straight(w):
    return w / w.sum(1, keepdim=True)


POSTERIORS = {
    "kernel": lambda e: _straight(_student(e)),
    "kernel turned": lambda e: _turned(_student(e)),
    "softmax": lambda e: e.softmax(-1),
    "exponentials": lambda e: _straight(e.exp()),
}
TARGETS = {
    "power": lambda q: _straight(q**2 / q.sum(0)),
    "product": lambda q: _straight(q * q / q.sum(0)),
    "power turned": lambda q: _turned(q**2 / q.sum(0)),
    "product turned": lambda q: _turned(q * q / q.sum(0)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", POSTERIORS)
def test_a_target_made_of_a_posterior_does_not_replace_it(name, target):
    torch.manual_seed(0)
    of, sharpen = POSTERIORS[name], TARGETS[target]
    model, x = Prototypes(lambda _, e: (of(e), sharpen(of(e)))), torch.randn(200, 16)
    with torch.no_grad():
        r = of(-model.double().energies(x.double()))
    model.float()
    row = next(row for row in _rows(model, x) if row["verdict"] == "em")
    entropy = float(-(r * r.log()).sum(-1).mean())
    load = r.mean(0)
    spread = float(-(load * load.log()).sum())
    assert row["components"]["load"] == pytest.approx(load.tolist(), abs=1e-5)
    assert row["responsibility"]["entropy"]["mean"] == pytest.approx(entropy, rel=1e-3)
    assert row["responsibility"]["information"] == pytest.approx(spread - entropy, rel=1e-3)
    assert row["evidence"]["gradient_error"] < 1e-4


class Decoder(nn.Module):
    """Greedy decoding: every token that wins is looked up and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.words = nn.Linear(16, 12), nn.GRUCell(8, 12), nn.Embedding(20, 8)
        self.head = nn.Linear(12, 20)

    def forward(self, x):
        state, token, scores = self.start(x), self.words.weight[0].expand(len(x), -1), []
        for _ in range(3):
            state = self.cell(token, state)
            scores.append(self.head(state))
            token = self.words(scores[-1].argmax(-1))
        return torch.stack(scores, 1)


def test_decoded_tokens_are_classes():
    torch.manual_seed(0)
    row = next(row for row in _rows(Decoder(), torch.randn(40, 16)) if row["mechanism"] == "selection")
    assert (row["alternatives"]["kind"], row["alternatives"]["count"]) == ("classes", 20)


CODES = {
    "nearest": lambda m, e: m.centres[e.argmax(-1)],
    "index handed out": lambda m, e: (m.centres[e.argmax(-1)], e.argmax(-1)),
    "scores handed out": lambda m, e: (nn.functional.embedding(e.argmax(-1), m.centres), e),
    "one-hot": lambda m, e: nn.functional.one_hot(e.argmax(-1), 8).to(e.dtype) @ m.centres,
}


@pytest.mark.parametrize("name", CODES)
def test_codes_are_looked_up_where_their_scores_came_from(name):
    torch.manual_seed(0)
    row = next(row for row in _rows(Prototypes(CODES[name]), torch.randn(60, 16)) if row["mechanism"] == "selection")
    assert row["alternatives"]["kind"] == "codes"


class Mixture(nn.Module):
    """A mixture of softmaxes."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.hidden, self.classes = nn.Linear(16, 3), nn.Linear(16, 24), nn.Linear(8, 5)

    def forward(self, x):
        shares = self.classes(self.hidden(x).unflatten(1, (3, 8))).softmax(-1)
        return (self.prior(x).softmax(-1)[..., None] * shares).sum(1).log()


def test_a_mixture_of_softmaxes_mixes_classes():
    torch.manual_seed(0)
    rows = {row["name"]: row for row in _rows(Mixture(), torch.randn(60, 16)) if row["mechanism"] == "softmax"}
    assert rows["classes"]["alternatives"]["kind"] == "classes"
    assert rows["prior"]["alternatives"]["kind"] == "experts"


def test_a_partition_over_distances_is_of_prototypes():
    torch.manual_seed(0)

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.distances = nn.Linear(16, 6)

        def forward(self, x):
            return self.distances(x).neg().logsumexp(-1)

    (row,) = _rows(Free(), torch.randn(60, 16))
    assert _said(row) == ("softmax", "log-partition", "prototypes", 6)


class Routed(nn.Module):
    """Eight experts that all run; a comparison of the chosen index with each one's number leaves one of them."""

    def __init__(self, groups) -> None:
        super().__init__()
        self.groups, self.gate = nn.Linear(16, 2) if groups else None, nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def choose(self, x):
        if self.groups is None:
            return self.gate(x).softmax(-1).max(-1)
        outer, group = self.groups(x).softmax(-1).max(-1)
        inner = self.gate(x).unflatten(-1, (2, 4)).softmax(-1)
        inner, place = inner.gather(1, group[:, None, None].expand(-1, 1, 4)).squeeze(1).max(-1)
        return outer * inner, group * 4 + place

    def forward(self, x):
        weight, index = self.choose(x)
        return sum(expert(x) * ((index == e) * weight)[:, None] for e, expert in enumerate(self.experts))


@pytest.mark.parametrize("groups", [False, True])
def test_a_router_by_comparison_chooses_among_all_experts(groups):
    torch.manual_seed(0)
    model, x = Routed(groups), torch.randn(300, 16)
    with torch.no_grad():
        load = model.choose(x)[1].bincount(minlength=8) / 300
    (row,) = _rows(model, x)
    assert _said(row) == ("truncation", "top-k", "experts", 8)
    assert row["components"]["load"] == pytest.approx(load.tolist(), abs=1e-6)
    assert (row["components"]["soft_load"] is None) == groups  # no value holds the product of both posteriors
