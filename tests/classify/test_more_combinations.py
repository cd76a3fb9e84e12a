"""Spellings multiplied out: quantizers, linear attention, pooling of tokens, mixtures, gates of channels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.conftest import look_at, rows_of
from tests.classify.hard.common import Attention, Net, linears

# ---- quantizers: (z, book) -> distances; distances -> index; (index, book) -> code; (z, code) -> output
DISTANCES = {
    "cdist": lambda z, b: torch.cdist(z, b),
    "expanded": lambda z, b: z.pow(2).sum(-1, keepdim=True) - 2 * z @ b.t() + b.pow(2).sum(-1),
    "differences": lambda z, b: ((z.unsqueeze(-2) - b) ** 2).sum(-1),
    "norm": lambda z, b: (z.unsqueeze(-2) - b).norm(dim=-1),
    "cosine": lambda z, b: -F.normalize(z, dim=-1) @ F.normalize(b, dim=-1).t(),
}
NEAREST = {
    "argmin": lambda d: d.argmin(-1),
    "argmax": lambda d: (-d).argmax(dim=-1),
    "min": lambda d: d.min(-1).indices,
    "topk": lambda d: d.topk(1, dim=-1, largest=False).indices.squeeze(-1),
    "softmax": lambda d: (-d).softmax(-1).argmax(-1),
}
LOOKUP = {
    "embedding": lambda i, b: F.embedding(i, b),
    "index": lambda i, b: b[i],
    "one_hot": lambda i, b: F.one_hot(i, 32).type_as(b) @ b,
    "scatter": lambda i, b: torch.zeros(*i.shape, 32).scatter_(-1, i.unsqueeze(-1), 1.0) @ b,
    "select": lambda i, b: b.index_select(0, i.flatten()).view(*i.shape, -1),
}
THROUGH = {
    "plain": lambda z, q: q,
    "straight": lambda z, q: z + (q - z).detach(),
    "residual": lambda z, q: z - q,
}


@pytest.mark.parametrize(("distance", "nearest", "lookup"), list(itertools.product(DISTANCES, NEAREST, LOOKUP)))
def test_nearest_code(distance: str, nearest: str, lookup: str) -> None:
    for through in THROUGH.values():
        torch.manual_seed(0)

        def forward(m, x, through=through):
            z = m.enc(x)
            q = LOOKUP[lookup](NEAREST[nearest](DISTANCES[distance](z, m.book)), m.book)
            return m.dec(through(z, q))

        net = Net(forward, enc=nn.Linear(16, 4), dec=nn.Linear(4, 16), book=torch.randn(32, 4))
        found = look_at(net, (torch.randn(4, 6, 16),))
        assert rows_of(found) == [("hard", "selection", 32)]
        assert not found.coverage.unclassified


# ---- linear attention: features of queries and keys; the order of the products --------------------
FEATURES = {
    "elu": lambda t: F.elu(t) + 1,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "square": lambda t: t.square() + 1e-6,
    "gaussian": lambda t: torch.exp(-t.pow(2)),
}


def keys_first(q, k, v):
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)


def by_einsum(q, k, v):
    z = 1 / (torch.einsum("bhqd,bhd->bhq", q, k.sum(2)) + 1e-6)
    return torch.einsum("bhqd,bhde,bhq->bhqe", q, torch.einsum("bhkd,bhke->bhde", k, v), z)


def scores_first(q, k, v):
    a = q @ k.mT
    return (a / a.sum(-1, keepdim=True)) @ v


def causal_scores(q, k, v):
    a = (q @ k.mT).tril()
    return (a @ v) / a.sum(-1, keepdim=True)


def causal_sums(q, k, v):
    kv = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, kv) / (q * k.cumsum(2)).sum(-1, keepdim=True).clamp(min=1e-6)


def ones_appended(q, k, v):
    out = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def recurrence(q, k, v):
    s, z, out = 0, 0, []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = z + k[:, :, t]
        out.append((q[:, :, t, None] @ s).squeeze(-2) / (q[:, :, t] * z).sum(-1, keepdim=True))
    return torch.stack(out, 2)


ORDERS = (keys_first, by_einsum, scores_first, causal_scores, causal_sums, ones_appended, recurrence)


@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("feature", FEATURES)
def test_linear_attention(feature: str, order) -> None:
    torch.manual_seed(0)
    phi = FEATURES[feature]
    found = look_at(Attention(lambda m, q, k, v: order(phi(q), phi(k), v)), (torch.randn(4, 6, 16),))
    gates = [row for row in rows_of(found) if row[1] in ("logistic", "threshold")]
    (competition,) = [row for row in rows_of(found) if row not in gates]
    assert competition[:2] in (("em", "kernel"), ("em", "softmax"))
    assert competition[2] == 6
    assert len(gates) <= 2
    assert not found.coverage.unclassified


# ---- pooling of tokens ----------------------------------------------------------------------------
SEEN = (torch.arange(6) < 5).unsqueeze(-1)
LARGEST = {
    "amax": lambda h: h.amax(1),
    "max": lambda h: h.max(dim=1)[0],
    "torch_max": lambda h: torch.max(h, 1).values,
    "masked": lambda h: h.masked_fill(~SEEN, -1e9).max(1).values,
    "infinite": lambda h: torch.where(SEEN, h, -math.inf).amax(dim=1),
    "adaptive": lambda h: F.adaptive_max_pool1d(h.mT, 1).squeeze(-1),
    "pool": lambda h: F.max_pool1d(h.mT, 6).squeeze(-1),
    "reduce": lambda h: torch.stack(list(h.unbind(1))).amax(0),
    "topk": lambda h: h.topk(1, dim=1).values.squeeze(1),
}
MEAN = {
    "mean": lambda h: h.mean(1),
    "masked": lambda h: (h * SEEN).sum(1) / SEEN.sum().clamp(min=1),
    "adaptive": lambda h: F.adaptive_avg_pool1d(h.mT, 1).squeeze(-1),
    "bmm": lambda h: torch.bmm((SEEN / SEEN.sum()).mT.expand(4, 1, 6), h).squeeze(1),
    "first": lambda h: h[:, 0],
    "std": lambda h: h.var(1).clamp(min=1e-8).sqrt(),
}
BODIES = {
    "linear": lambda m, x: m.fc(x),
    "norm": lambda m, x: F.layer_norm(m.fc(x), (8,)),
    "residual": lambda m, x: m.fc(x) + x[..., :8],
    "embedding": lambda m, x: m.emb(x.argmax(-1)),
}


@pytest.mark.parametrize(
    ("body", "pool"), list(itertools.product(BODIES, [*LARGEST, *(f"{name}_mean" for name in MEAN)]))
)
def test_pooling(body: str, pool: str) -> None:
    torch.manual_seed(0)
    reduce = MEAN[pool.removesuffix("_mean")] if pool.endswith("_mean") else LARGEST[pool]
    net = Net(
        lambda m, x: m.o(reduce(BODIES[body](m, x))), fc=nn.Linear(16, 8), o=nn.Linear(8, 3), emb=nn.Embedding(16, 8)
    )
    found = look_at(net, (torch.randn(4, 6, 16),))
    assert rows_of(found) == ([] if pool.endswith("_mean") else [("hard", "selection", 6)])
    assert not found.coverage.unclassified


# ---- mixtures: weights of experts; how the mean is taken ------------------------------------------
WEIGHTS = {
    "softmax": ("softmax", lambda z: z.softmax(-1)),
    "by_hand": ("softmax", lambda z: z.exp() / z.exp().sum(-1, keepdim=True)),
    "log": ("softmax", lambda z: F.log_softmax(z, -1).exp()),
    "gumbel": ("softmax", lambda z: F.gumbel_softmax(z, tau=0.5)),
    "sigmoid": ("kernel", lambda z: F.normalize(z.sigmoid(), p=1, dim=-1)),
    "softplus": ("kernel", lambda z: F.softplus(z) / F.softplus(z).sum(-1, keepdim=True)),
}
MIXED = {
    "stack": lambda m, x, w: (torch.stack([f(x) for f in m.experts], -1) * w.unsqueeze(-2)).sum(-1),
    "loop": lambda m, x, w: sum(w[..., i, None] * f(x) for i, f in enumerate(m.experts)),
    "einsum": lambda m, x, w: torch.einsum("ne,nd,edo->no", w, x, m.w),
    "weights": lambda m, x, w: torch.bmm(x.unsqueeze(1), torch.einsum("ne,edo->ndo", w, m.w)).squeeze(1),
    "chunk": lambda m, x, w: sum(p * f(x) for p, f in zip(w.chunk(4, -1), m.experts, strict=True)),
}


@pytest.mark.parametrize(("weights", "mixed"), list(itertools.product(WEIGHTS, MIXED)))
def test_dense_mixture(weights: str, mixed: str) -> None:
    torch.manual_seed(0)
    mechanism, fn = WEIGHTS[weights]
    net = Net(
        lambda m, x: MIXED[mixed](m, x, fn(m.gate(x))),
        gate=nn.Linear(16, 4),
        experts=linears(4, 16, 8),
        w=torch.randn(4, 16, 8),
    )
    found = look_at(net, (torch.randn(32, 16),))
    assert rows_of(found) == [("em", mechanism, 4)]
    assert not found.coverage.unclassified


# ---- gates of channels ----------------------------------------------------------------------------
SQUEEZE = {
    "mean": lambda x: x.mean((2, 3)),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "pool": lambda x: F.avg_pool2d(x, x.shape[-1]).view(x.shape[0], -1),
    "sum": lambda x: x.flatten(2).sum(-1) / 64,
}
EXCITE = {
    "sigmoid": ("em", "logistic", torch.sigmoid),
    "hardsigmoid": ("hard", "threshold", F.hardsigmoid),
    "relu6": ("hard", "threshold", lambda z: F.relu6(z + 3) / 6),
    "tanh": ("em", "logistic", lambda z: 1 + z.tanh()),
}
SCALE = {
    "times": lambda x, s: x * s[:, :, None, None],
    "expand": lambda x, s: x * s.view(*s.shape, 1, 1).expand_as(x),
    "residual": lambda x, s: x + x * s[:, :, None, None],
    "einsum": lambda x, s: torch.einsum("bchw,bc->bchw", x, s),
}


@pytest.mark.parametrize(("squeeze", "excite", "scale"), list(itertools.product(SQUEEZE, EXCITE, SCALE)))
def test_squeeze_and_excitation(squeeze: str, excite: str, scale: str) -> None:
    torch.manual_seed(0)
    verdict, mechanism, gate = EXCITE[excite]

    def forward(m, x):
        x = m.conv(x)
        return SCALE[scale](x, gate(m.up(F.silu(m.down(SQUEEZE[squeeze](x))))))

    net = Net(forward, conv=nn.Conv2d(3, 8, 1), down=nn.Linear(8, 2), up=nn.Linear(2, 8))
    found = look_at(net, (torch.randn(4, 3, 8, 8),))
    assert rows_of(found) == sorted([("em", "logistic", 2), (verdict, mechanism, 2)])
    assert not found.coverage.unclassified
