"""Spellings multiplied out: scores by normalizers by means, routers by ways to their experts, layers by gates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emscan.classify.evidence import gather
from tests.classify.conftest import look_at, rows_of
from tests.classify.hard.common import Net, heads, linears, merge

MASK = torch.ones(6, 6, dtype=torch.bool).triu(1)

# ---- attention: (q, k) -> scores; scores -> weights; (weights, v) -> means ------------------------
SCORES = {
    "matmul": lambda m, q, k: torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8),
    "einsum": lambda m, q, k: torch.einsum("bhqd,bhkd->bhqk", q * 8**-0.5, k),
    "bmm": lambda m, q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(4, 2, 6, 6),
    "biased": lambda m, q, k: q @ k.mT + m.bias,
    "cosine": lambda m, q, k: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.scale.exp().clamp(max=100),
    "distance": lambda m, q, k: -torch.cdist(q, k).pow(2) / 8,
    "additive": lambda m, q, k: (q.unsqueeze(3) + k.unsqueeze(2)).mul(m.w).sum(-1),
    "product": lambda m, q, k: (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1),
}


def by_hand(s):
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


NORMALIZERS = {
    "softmax": lambda s: s.softmax(-1),
    "float": lambda s: F.softmax(s, dim=-1, dtype=torch.float64).type_as(s),
    "by_hand": by_hand,
    "minus_logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)),
    "exp_log_softmax": lambda s: F.log_softmax(s, -1).exp(),
    "guarded": lambda s: (lambda e: e / (e.sum(-1, keepdim=True) + 1e-9))(torch.exp(s)),
    "base_two": lambda s: F.normalize(torch.exp2(s), p=1, dim=-1),
    "transposed": lambda s: s.transpose(-1, -2).softmax(-2).transpose(-1, -2),
    "masked": lambda s: s.masked_fill(MASK, -math.inf).softmax(-1),
    "added_mask": lambda s: (s + MASK * torch.finfo(s.dtype).min).softmax(-1),
    "masked_after": lambda s: (lambda e: e / e.sum(-1, keepdim=True))(s.exp() * (~MASK)),
    "where": lambda s: torch.where(MASK, torch.finfo(s.dtype).min, s).softmax(-1),
}
MEANS = {
    "matmul": lambda p, v: p @ v,
    "einsum": lambda p, v: torch.einsum("bhqk,bhkd->bhqd", p, v),
    "sum": lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(2)).sum(3),
}


def attention(score, normalize, mean):
    def forward(m, x):
        q, k, v = (heads(f(x)) for f in m.qkv)
        return m.o(merge(MEANS[mean](NORMALIZERS[normalize](SCORES[score](m, q, k)), v)))

    parts = {"bias": torch.randn(2, 6, 6), "scale": torch.ones(2, 1, 1), "w": torch.randn(8)}
    return Net(forward, qkv=linears(3), o=nn.Linear(16, 16), **parts), (torch.randn(4, 6, 16),)


# ---- routers: logits -> (weights, indices); (x, weights, indices) -> outputs ----------------------
def grouped(m, z):
    s = z.sigmoid()
    g = (s + m.b).view(-1, 2, 2).topk(1, -1).values.sum(-1).topk(1, -1).indices
    inside = torch.zeros(z.shape[0], 2).scatter(1, g, 1.0).repeat_interleave(2, 1)
    i = (s + m.b).masked_fill(inside == 0, -math.inf).topk(2, -1).indices
    w = s.gather(1, i)
    return w / w.sum(-1, keepdim=True), i


ROUTES = {
    "softmax_topk": lambda m, z: z.softmax(-1).topk(2, -1),
    "renormalized": lambda m, z: (lambda w, i: (w / w.sum(-1, keepdim=True), i))(*z.softmax(-1).topk(2, -1)),
    "topk_softmax": lambda m, z: (lambda w, i: (w.softmax(-1), i))(*z.topk(2, -1)),
    "topk_sigmoid": lambda m, z: (lambda w, i: (w.sigmoid(), i))(*z.topk(2, -1)),
    "sigmoid_biased": lambda m, z: (lambda s, i: (F.normalize(s.gather(1, i), p=1, dim=1), i))(
        z.sigmoid(), (z.sigmoid() + m.b).topk(2, -1).indices
    ),
    "grouped": grouped,
    "sorted": lambda m, z: tuple(t[:, :2] for t in z.softmax(-1).sort(-1, descending=True)),
    "max": lambda m, z: z.softmax(-1).max(-1, keepdim=True),
    "argmax": lambda m, z: (lambda i: (z.softmax(-1).gather(1, i), i))(z.argmax(-1, keepdim=True)),
}


def by_where(m, x, w, i):
    out = torch.zeros(x.shape[0], 8)
    for e in range(4):
        token, slot = torch.where(i == e)
        out.index_add_(0, token, (x[token] @ m.w[e]) * w[token, slot].unsqueeze(-1))
    return out


def by_nonzero_of_one_hot(m, x, w, i):
    out = torch.zeros(x.shape[0], 8)
    mask = F.one_hot(i, 4).permute(2, 1, 0)
    for e in (mask.sum((-1, -2)) > 0).nonzero().flatten():
        slot, token = mask[e].nonzero(as_tuple=True)
        out[token] += (x[token] @ m.w[e]) * w[token, slot, None]
    return out


def by_sorting(m, x, w, i):
    order = i.flatten().argsort()
    token = order // i.shape[1]
    counts = torch.bincount(i.flatten(), minlength=4).tolist()
    y = torch.cat([part @ m.w[e] for e, part in enumerate(x[token].split(counts))])
    return torch.zeros(x.shape[0], 8).index_add(0, token, y * w.flatten()[order].unsqueeze(-1))


def by_scattered_weights(m, x, w, i):
    full = torch.zeros(x.shape[0], 4).scatter(1, i, w)
    return torch.einsum("ne,nd,edo->no", full, x, m.w)


def by_stacked_outputs(m, x, w, i):
    every = torch.stack([f(x) for f in m.experts], 1)
    return (every.gather(1, i.unsqueeze(-1).expand(-1, -1, 8)) * w.unsqueeze(-1)).sum(1)


def by_capacity(m, x, w, i):
    mask = F.one_hot(i, 4).float()
    place = ((mask.sum(1).cumsum(0) - 1).unsqueeze(1) * mask).sum(-1)
    combine = torch.einsum("nk,nke,nkc->nec", w, mask, F.one_hot(place.long(), x.shape[0]).float())
    inside = torch.einsum("nec,nd->ecd", combine.bool().float(), x)
    return torch.einsum("nec,eco->no", combine, torch.bmm(inside, m.w))


REACH = {
    "where": by_where,
    "nonzero": by_nonzero_of_one_hot,
    "sorting": by_sorting,
    "indexed": lambda m, x, w, i: torch.einsum("nk,nd,nkdo->no", w, x, m.w[i]),
    "embedding": lambda m, x, w, i: torch.einsum(
        "nk,nd,nkdo->no", w, x, F.embedding(i, m.w.flatten(1)).unflatten(-1, (16, 8))
    ),
    "scattered": by_scattered_weights,
    "stacked": by_stacked_outputs,
    "capacity": by_capacity,
}


def router(route, reach):
    def forward(m, x):
        return REACH[reach](m, x, *ROUTES[route](m, m.gate(x)))

    parts = {"gate": nn.Linear(16, 4), "experts": linears(4, 16, 8)}
    return Net(forward, w=torch.randn(4, 16, 8), b=torch.zeros(4), **parts), (torch.randn(32, 16),)


# ---- gates: x -> values of a layer; values -> gated -----------------------------------------------
LAYERS = {
    "linear": lambda m, x: m.fc(x),
    "matmul": lambda m, x: x @ m.w + m.c,
    "addmm": lambda m, x: torch.addmm(m.c, x.reshape(-1, 16), m.w).view(*x.shape[:-1], 12),
    "einsum": lambda m, x: torch.einsum("bti,io->bto", x, m.w),
    "convolution": lambda m, x: m.conv(x.mT).mT,
    "batch_norm": lambda m, x: m.bn(m.conv(x.mT)).mT,
    "layer_norm": lambda m, x: m.ln(m.fc(x)),
    "rms_norm": lambda m, x: (lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * m.g)(m.fc(x)),
    "residual": lambda m, x: m.fc(x) + x[..., :12],
    "two_layers": lambda m, x: m.fc(x) + m.other(x),
    "modulated": lambda m, x: m.fc(x) * (1 + m.other(x)),
    "dropout": lambda m, x: F.dropout(m.fc(x), 0.1, m.training),
    "half": lambda m, x: m.wide(x).chunk(2, -1)[0],
    "heads": lambda m, x: heads(m.fc(x)),
    "embedding": lambda m, x: m.emb(x.argmax(-1)),
}
TWO_WAY, THRESHOLD, SMOOTH = ("em", "logistic", 2), ("hard", "threshold", 2), ("soft", "smooth-gate", 2)
GATES = {
    "sigmoid": (TWO_WAY, torch.sigmoid),
    "sigmoid_by_hand": (TWO_WAY, lambda z: 1 / (1 + torch.exp(-z))),
    "tanh": (TWO_WAY, lambda z: z.tanh()),
    "silu": (TWO_WAY, F.silu),
    "silu_by_hand": (TWO_WAY, lambda z: z * z.sigmoid()),
    "softplus": (TWO_WAY, F.softplus),
    "softplus_by_hand": (TWO_WAY, lambda z: torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0)),
    "gelu_tanh": (TWO_WAY, lambda z: F.gelu(z, approximate="tanh")),
    "gelu_tanh_by_hand": (TWO_WAY, lambda z: 0.5 * z * (1 + torch.tanh(0.7978845608 * (z + 0.044715 * z**3)))),
    "mish": (TWO_WAY, lambda z: z * F.softplus(z).tanh()),
    "gelu": (SMOOTH, F.gelu),
    "gelu_by_hand": (SMOOTH, lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))),
    "softsign": (SMOOTH, lambda z: z / (1 + z.abs())),
    "relu": (THRESHOLD, F.relu),
    "relu_by_clamp": (THRESHOLD, lambda z: z.clamp(min=0)),
    "relu_by_where": (THRESHOLD, lambda z: torch.where(z > 0, z, 0.0)),
    "relu_squared": (THRESHOLD, lambda z: F.relu(z) ** 2),
    "leaky": (THRESHOLD, lambda z: torch.where(z > 0, z, 0.1 * z)),
    "elu_plus_one": (THRESHOLD, lambda z: F.elu(z) + 1),
    "hardswish": (THRESHOLD, lambda z: z * F.relu6(z + 3) / 6),
    "none": (None, lambda z: z * 2 + 1),
    "square": (None, lambda z: z * z),
    "exponential": (None, lambda z: torch.exp(-z.abs())),
    "standardized": (None, lambda z: (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-5)),
}


def gated(layer, gate):
    def forward(m, x):
        return GATES[gate][1](LAYERS[layer](m, x))

    parts = {
        "fc": nn.Linear(16, 12),
        "other": nn.Linear(16, 12),
        "wide": nn.Linear(16, 24),
        "emb": nn.Embedding(16, 12),
    }
    norms = {"conv": nn.Conv1d(16, 12, 1), "bn": nn.BatchNorm1d(12), "ln": nn.LayerNorm(12)}
    tensors = {"w": torch.randn(16, 12), "c": torch.randn(12), "g": torch.ones(12)}
    return Net(forward, **parts, **norms, **tensors), (torch.randn(4, 6, 16),)


@pytest.mark.parametrize(("score", "normalize", "mean"), list(itertools.product(SCORES, NORMALIZERS, MEANS)))
def test_attention(score: str, normalize: str, mean: str) -> None:
    torch.manual_seed(0)
    found = look_at(*attention(score, normalize, mean))
    assert rows_of(found) == [("em", "softmax", 6)]
    assert not found.coverage.unclassified


@pytest.mark.parametrize(("route", "reach"), list(itertools.product(ROUTES, REACH)))
def test_router(route: str, reach: str) -> None:
    torch.manual_seed(0)
    found = look_at(*router(route, reach))
    assert rows_of(found) == [("hard", "truncation", 4)]
    assert not found.coverage.unclassified


@pytest.mark.parametrize(("layer", "gate"), list(itertools.product(LAYERS, GATES)))
def test_gate(layer: str, gate: str) -> None:
    torch.manual_seed(0)
    found = look_at(*gated(layer, gate))
    expected = GATES[gate][0]
    assert rows_of(found) == ([expected] if expected else [])
    assert not found.coverage.unclassified


@pytest.mark.parametrize(("score", "normalize"), list(itertools.product(SCORES, NORMALIZERS)))
def test_evidence_of_attention(score: str, normalize: str) -> None:
    torch.manual_seed(0)
    found = look_at(*attention(score, normalize, "matmul"))
    (site,) = [row.site for row in found.rows if row.site]
    evidence = gather(site, found.trace, 16.0)
    assert evidence.differentiable
    assert evidence.tolerance is not None
    assert evidence.tolerance < 1e-3
    assert evidence.sum_error is not None
    assert evidence.sum_error <= evidence.tolerance
    assert evidence.gradient_error is not None
    assert evidence.gradient_error <= evidence.tolerance
