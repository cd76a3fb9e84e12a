"""Routers written by hand: how experts are chosen and how they are run, with what each chooses by its own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

K, WIDTH, TOKENS = 8, 20, 2000
DEAD, SECOND, STARVED = 1, 2, 3


def planted_scores(tokens: int = TOKENS, experts: int = K, seed: int = 0) -> Tensor:
    """Scores (tokens, experts): one expert always last, one never first but often second, one first for one token."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator) * 0.3
    free = [e for e in range(experts) if e not in {DEAD, SECOND, STARVED}]
    first = torch.tensor(free)[torch.randint(len(free), (tokens,), generator=generator)]
    scores[torch.arange(tokens), first] = 2.5
    half = torch.arange(tokens) % 2 == 0
    scores[half, SECOND] = 1.8
    scores[~half, SECOND] = -1.2
    scores[:, STARVED] = -1.6
    scores[7, STARVED] = 3.5
    scores[:, DEAD] = -2.5
    return scores


def tokens_for(scores: Tensor, width: int = WIDTH) -> Tensor:
    """Inputs whose first entries are the scores that an identity gate hands on."""
    rest = torch.randn(*scores.shape[:-1], width - scores.shape[-1], generator=torch.Generator().manual_seed(9))
    return torch.cat([scores, rest], -1)


# ---- how experts are chosen: (weights, indices) of shape (n, k) ----------------------------------------------------
@dataclass
class Form:
    """A way to choose, and in float64 what it chooses and its posterior before truncation."""

    route: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    choose: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor], Tensor]


BIAS = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.0, -0.05, 0.02, 0.0])


def _normalized(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True)


def _softmax_then_top(m, z):
    w, i = z.softmax(-1).topk(2, -1)
    return _normalized(w), i


def _top_then_softmax(m, z):
    v, i = z.topk(2, -1)
    return v.softmax(-1), i


def _sigmoid_then_top(m, z):
    w, i = z.sigmoid().topk(2, -1)
    return _normalized(w), i


def _top_then_sigmoid(m, z):
    v, i = z.topk(2, -1)
    return _normalized(v.sigmoid()), i


def _root_of_softplus(m, z):
    s = F.softplus(z).sqrt()
    i = (s + m.bias).topk(2, -1, sorted=False)[1]
    return _normalized(s.gather(-1, i)), i


def _biased_choice(m, z):
    s = z.sigmoid()
    i = (s + m.bias).topk(2, -1)[1]
    return _normalized(s.gather(-1, i)), i


def _biased_softmax(m, z):
    p = z.softmax(-1)
    i = (p + m.bias).topk(2, -1)[1]
    return p.gather(-1, i), i


def _biased_logits(m, z):
    i = (z + m.bias).topk(2, -1)[1]
    return _normalized(z.gather(-1, i).sigmoid()), i


def _grouped_softmax(m, z):
    p = z.softmax(-1)
    best = p.view(-1, 4, K // 4).amax(-1).topk(2, -1)[1]
    open_ = torch.zeros(len(z), 4).scatter(1, best, 1.0).unsqueeze(-1).expand(-1, 4, K // 4).reshape(-1, K)
    w, i = p.masked_fill(~open_.bool(), 0.0).topk(2, -1)
    return w, i


def _grouped_sigmoid(m, z):
    s = z.sigmoid()
    choice = s + m.bias
    best = choice.view(-1, 4, K // 4).topk(2, -1)[0].sum(-1).topk(2, -1)[1]
    open_ = torch.zeros(len(z), 4).scatter_(1, best, 1.0).unsqueeze(-1).expand(-1, 4, K // 4).reshape(-1, K)
    i = choice.masked_fill(~open_.bool(), float("-inf")).topk(2, -1)[1]
    return _normalized(s.gather(1, i)), i


def _inside_one_group(m, z):
    p = z.softmax(-1)
    g = p.reshape(-1, 2, K // 2).amax(-1).argmax(-1)
    inside = p.reshape(-1, 2, K // 2)[torch.arange(len(z)), g]
    w, i = inside.topk(2, -1)
    return _normalized(w), i + K // 2 * g.unsqueeze(-1)


def _shares_inside_one_group(m, z):
    s = z.sigmoid()
    g = s.reshape(-1, 2, K // 2).sum(-1).argmax(-1)
    w, i = s.reshape(-1, 2, K // 2)[torch.arange(len(z)), g].topk(2, -1)
    return _normalized(w), i + K // 2 * g.unsqueeze(-1)


def _argmax(m, z):
    p = z.softmax(-1)
    i = p.argmax(-1, keepdim=True)
    return p.gather(-1, i), i


def _maximum(m, z):
    return z.softmax(-1).max(-1, keepdim=True)


def _best_then_best_of_the_rest(m, z):
    p = z.softmax(-1)
    first = p.argmax(-1)
    second = p.masked_fill(F.one_hot(first, K).bool(), 0.0).argmax(-1)
    i = torch.stack([first, second], -1)
    return _normalized(p.gather(-1, i)), i


def _sorted(m, z):
    p, i = z.softmax(-1).sort(-1, descending=True)
    return _normalized(p[:, :2]), i[:, :2]


def _argsorted(m, z):
    p = z.softmax(-1)
    i = p.argsort(-1, descending=True)[:, :2]
    return p.gather(1, i), i


def _four_then_two(m, z):
    """Four candidates first, then the best two of these: the last word counts."""
    kept = torch.zeros_like(z).scatter(1, z.topk(4, -1)[1], 1.0).bool()
    w, i = z.masked_fill(~kept, float("-inf")).softmax(-1).topk(2, -1)
    return w, i


def _top(k: int) -> Callable[[Tensor], Tensor]:
    return lambda z: z.topk(k, -1)[1]


def _of_groups(score: Callable[[Tensor], Tensor], best: Callable[[Tensor], Tensor], groups: int, kept: int):
    def choose(z: Tensor) -> Tensor:
        s = score(z)
        parts = s.reshape(len(z), groups, -1)
        chosen = best(parts).topk(kept, -1)[1]
        closed = torch.ones(len(z), groups, dtype=torch.bool).scatter(1, chosen, False)
        return parts.masked_fill(closed[..., None], -math.inf).flatten(1).topk(2, -1)[1]

    return choose


def _soft(z: Tensor) -> Tensor:
    return z.softmax(-1)


def _sig(z: Tensor) -> Tensor:
    return _normalized(z.sigmoid())


def _largest(parts: Tensor) -> Tensor:
    return parts.amax(-1)


FORMS = {
    "softmax, top-k": Form(_softmax_then_top, _top(2), _soft),
    "top-k, softmax": Form(_top_then_softmax, _top(2), _soft),
    "sigmoid, top-k, shares": Form(_sigmoid_then_top, _top(2), _sig),
    "top-k, sigmoid": Form(_top_then_sigmoid, _top(2), _sig),
    "root of softplus": Form(
        _root_of_softplus,
        lambda z: (F.softplus(z).sqrt() + BIAS).topk(2, -1)[1],
        lambda z: _normalized(F.softplus(z).sqrt()),
    ),
    "sigmoid, biased choice": Form(_biased_choice, lambda z: (z.sigmoid() + BIAS).topk(2, -1)[1], _sig),
    "softmax, biased choice": Form(_biased_softmax, lambda z: (z.softmax(-1) + BIAS).topk(2, -1)[1], _soft),
    "biased logits, sigmoid": Form(_biased_logits, lambda z: (z + BIAS).topk(2, -1)[1], _sig),
    "groups by their best": Form(_grouped_softmax, _of_groups(_soft, _largest, 4, 2), _soft),
    "groups by their best two, bias": Form(
        _grouped_sigmoid,
        _of_groups(lambda z: z.sigmoid() + BIAS, lambda p: p.topk(2, -1)[0].sum(-1), 4, 2),
        _sig,
    ),
    "inside one group": Form(_inside_one_group, _of_groups(_soft, _largest, 2, 1), _soft),
    "shares inside one group": Form(
        _shares_inside_one_group, _of_groups(lambda z: z.sigmoid(), lambda p: p.sum(-1), 2, 1), _sig
    ),
    "argmax": Form(_argmax, _top(1), _soft),
    "maximum": Form(_maximum, _top(1), _soft),
    "best, then best of the rest": Form(_best_then_best_of_the_rest, _top(2), _soft),
    "sort": Form(_sorted, _top(2), _soft),
    "argsort": Form(_argsorted, _top(2), _soft),
    "four, then two of these": Form(_four_then_two, _top(2), _soft),
}


# ---- how experts are run ----------------------------------------------------------------------------------------
class Loop(nn.Module):
    """Only experts with tokens, found by nonzero; outputs added by index."""

    def forward(self, m, x, w, i):
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(i, m.up.shape[0]).permute(2, 1, 0)
            hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hit[:, 0]:
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, F.linear(x[token], m.up[e]) * w[token, slot, None])
        return out


class Comparison(nn.Module):
    """Every expert in Python's order, with the rows that chose it."""

    def forward(self, m, x, w, i):
        out = torch.zeros_like(x)
        for e in range(m.up.shape[0]):
            rows, slot = (i == e).nonzero(as_tuple=True)
            out = out.index_add(0, rows, (x[rows] @ m.up[e].T) * w[rows, slot].unsqueeze(-1))
        return out


class Lookup(nn.Module):
    """The chosen experts' matrices looked up for every token."""

    def forward(self, m, x, w, i):
        return torch.einsum("nkfd,nd,nk->nf", m.up[i], x, w)


class Dense(nn.Module):
    """All experts on all tokens, under weights scattered to all of them."""

    def forward(self, m, x, w, i):
        full = torch.zeros(len(x), m.up.shape[0]).scatter(1, i, w)
        return torch.einsum("ne,enf->nf", full, torch.einsum("nd,efd->enf", x, m.up))


class Sorted(nn.Module):
    """Rows sorted by expert, a slice for each."""

    def forward(self, m, x, w, i):
        flat = i.flatten()
        order = flat.argsort()
        rows = x[order // i.shape[-1]]
        ends = torch.bincount(flat, minlength=m.up.shape[0]).cumsum(0).tolist()
        parts = [rows[a:b] @ m.up[e].T for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]
        done = torch.cat(parts) * w.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // i.shape[-1], done)


RUNS = {"loop": Loop, "comparison": Comparison, "lookup": Lookup, "dense": Dense, "sorted": Sorted}


class Mixture(nn.Module):
    """An identity gate, a form, a way to run experts; perhaps an expert that is always on."""

    def __init__(self, route, run, experts: int = K, width: int = WIDTH, *, shared: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, width) * 0.2)
        self.bias = nn.Buffer(BIAS.clone() if experts == K else torch.zeros(experts))
        self.shared = nn.Linear(width, width) if shared else None
        self.route, self.run = route, run
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(experts, width))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        w, i = self.route(self, self.gate(flat))
        out = self.run(self, flat, w, i)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)
