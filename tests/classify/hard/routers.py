"""Routers of mixtures of experts: how weights and indices are found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    TWO_WAY,
    Net,
    case,
    linears,
    seq,
    softmax,
    truncation,
    vec,
)


# ---- how the weights and indices are found --------------------------------------------------------
class Experts(nn.Module):
    """One matrix per expert in a parameter; ``hit`` experts only, driven by nonzero, as transformers does."""

    def __init__(self, n=8):
        super().__init__()
        self.n = n
        self.up, self.down = nn.Parameter(torch.randn(n, 12, 16) * 0.2), nn.Parameter(torch.randn(n, 16, 12) * 0.2)

    def forward(self, x, index, weight):
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(index, num_classes=self.n).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            h = F.linear(F.linear(x[token], self.up[e]), self.down[e])
            out.index_add_(0, token, (h * weight[token, slot, None]).to(out.dtype))
        return out


class Sparse(nn.Module):
    """Router logits of 8 experts; ``route(module, logits) -> (weights, indices)``."""

    def __init__(self, route, n=8, **parts):
        super().__init__()
        self.gate = nn.Linear(16, n, bias=False)
        self.experts = Experts(n)
        self.route = route
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        flat = x.reshape(-1, 16)
        weight, index = self.route(self, self.gate(flat))
        return self.experts(flat, index, weight).view_as(x)


def mixtral(m, z):
    p = F.softmax(z, dim=1, dtype=torch.float)
    w, i = torch.topk(p, 2, dim=-1)
    w /= w.sum(dim=-1, keepdim=True)
    return w.to(z.dtype), i


def qwen_without_renormalization(m, z):
    w, i = torch.topk(F.softmax(z, dim=-1), 3, dim=-1)
    return w, i


def gpt_oss(m, z):
    v, i = torch.topk(z + m.bias, 2, dim=-1)
    return F.softmax(v, dim=1, dtype=v.dtype), i


def gpt_oss_scattered(m, z):
    v, i = torch.topk(z, 2, dim=-1)
    scores = torch.zeros_like(z).scatter_(1, i, F.softmax(v, dim=1))
    return scores.gather(1, i), i


def llama_four(m, z):
    v, i = torch.topk(z, 1, dim=1)
    scores = torch.full_like(z, float("-inf")).scatter_(1, i, v)
    return torch.sigmoid(scores.float()).gather(1, i), i


def deepseek_two(m, z):
    """Softmax scores, the best groups by their best expert, then the best experts of these."""
    p = z.softmax(dim=-1, dtype=torch.float32)
    group = p.view(-1, 4, 2).max(dim=-1).values
    chosen = torch.topk(group, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group).scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    w, i = torch.topk(p.masked_fill(~mask.bool(), 0.0), k=2, dim=-1, sorted=False)
    return w * 16.0, i


def deepseek_three(m, z):
    """Sigmoid scores, a bias only for the choice, groups by the sum of their two best, weights normalized after."""
    scores = z.sigmoid()
    choice = scores.view(-1, 8) + m.bias.unsqueeze(0)
    group = choice.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(group, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group)
    mask.scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    i = torch.topk(choice.masked_fill(~mask.bool(), 0.0), k=3, dim=-1, sorted=False)[1]
    w = scores.gather(1, i)
    w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)
    return w * 2.5, i


def deepseek_three_with_infinity(m, z):
    scores = torch.sigmoid(z.float())
    choice = (scores + m.bias).unflatten(1, (2, 4))
    groups = choice.topk(2, dim=-1).values.sum(-1).topk(1, dim=-1).indices
    closed = torch.ones(z.shape[0], 2, dtype=torch.bool).scatter_(1, groups, False)
    i = choice.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1).topk(2, dim=-1)[1]
    w = scores.gather(1, i)
    return (w / w.sum(-1, keepdim=True)).type_as(z), i


def ernie(m, z):
    """Softmax probabilities, a correction bias for the choice, and a guard where the sum is divided by."""
    p = F.softmax(z, dim=1, dtype=torch.float)
    i = torch.topk(p + m.bias, 2, dim=-1)[1]
    w = torch.gather(p, dim=-1, index=i)
    return w / torch.clamp(w.sum(dim=-1, keepdim=True), min=1e-12), i


def sigmoid_over_the_chosen(m, z):
    v, i = z.topk(2, dim=-1)
    w = torch.sigmoid(v)
    return w / w.sum(-1, keepdim=True), i


def cosine_router(m, z):
    similarity = F.normalize(z, dim=-1) @ F.normalize(m.table, dim=0)
    w, i = (similarity * torch.clamp(m.temperature, max=4.6).exp()).softmax(-1).topk(2, -1)
    return w, i


def sorted_router(m, z):
    p, i = torch.sort(z.softmax(-1), dim=-1, descending=True)
    return p[:, :2] / p[:, :2].sum(-1, keepdim=True), i[:, :2]


def two_maxima(m, z):
    """GShard: the best, then the best of the rest."""
    p = z.softmax(-1)
    first = p.argmax(-1)
    mask = F.one_hot(first, 8).bool()
    second = p.masked_fill(mask, 0.0).argmax(-1)
    i = torch.stack([first, second], -1)
    w = p.gather(-1, i)
    return w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).eps), i


def sparse_mixer(m, z):
    """Top-1 twice, each with a softmax over the experts near the maximum (Phi-MoE in evaluation)."""
    with torch.no_grad():
        best, first = z.max(dim=-1, keepdim=True)
        far = ((best - z) / z.abs().clamp(min=best)) > 0.02
    w1 = z.masked_fill(far, float("-inf")).softmax(-1).gather(-1, first)
    rest = torch.scatter(z, -1, first, float("-inf"))
    with torch.no_grad():
        best, second = rest.max(dim=-1, keepdim=True)
        far = ((best - z) / z.abs().clamp(min=best)) > 0.02
    w2 = rest.masked_fill(far, float("-inf")).softmax(-1).gather(-1, second)
    return torch.cat([w1, w2], -1), torch.cat([first, second], -1)


def top_one_sigmoid(m, z):
    """BASE layers: the nearest centroid's expert, its output scaled by a sigmoid of the affinity."""
    i = z.argmax(dim=1, keepdim=True)
    return torch.sigmoid(z.gather(1, i)), i


def maximum_of_probabilities(m, z):
    return torch.max(torch.softmax(z, dim=-1), dim=-1, keepdim=True)


for _route, _parts in (
    (mixtral, {}),
    (qwen_without_renormalization, {}),
    (gpt_oss, {"bias": torch.zeros(8)}),
    (gpt_oss_scattered, {}),
    (llama_four, {}),
    (deepseek_two, {}),
    (deepseek_three, {"bias": torch.zeros(8)}),
    (deepseek_three_with_infinity, {"bias": torch.linspace(0, 0.1, 8)}),
    (ernie, {"bias": torch.zeros(8)}),
    (sigmoid_over_the_chosen, {}),
    (
        cosine_router,
        {"table": torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), "temperature": torch.ones(1)},
    ),
    (sorted_router, {}),
    (two_maxima, {}),
    (sparse_mixer, {}),
    (top_one_sigmoid, {}),
    (maximum_of_probabilities, {}),
):

    def _build(route=_route, parts=_parts):
        return Sparse(route, **{k: v.clone() for k, v in parts.items()}), seq(8, 8)

    _build.__name__ = f"route_{_route.__name__}"
    case(truncation(8))(_build)


@case(softmax(8))
def router_that_keeps_every_expert():
    def route(m, z):
        w, i = z.softmax(-1).topk(8, -1)
        return w / w.sum(-1, keepdim=True), i

    return Sparse(route), vec()


# ---- more of both --------------------------------------------------------------------------------------
def best_by_argsort(m, z):
    p = z.softmax(-1)
    i = torch.argsort(p, dim=-1, descending=True)[:, :2]
    return torch.gather(p, 1, i), i


def kept_by_threshold_of_the_kth(m, z):
    kth = torch.kthvalue(z, 7, dim=-1, keepdim=True).values
    p = torch.where(z >= kth, z, torch.full_like(z, -1e9)).softmax(-1)
    return p.topk(2, -1)


def bias_added_before_softmax(m, z):
    w, i = torch.topk((z + m.bias).softmax(-1, dtype=torch.float32), 2)
    return w.to(z.dtype) / w.sum(-1, keepdim=True).to(z.dtype), i


def chosen_under_no_grad(m, z):
    with torch.no_grad():
        i = z.topk(2, dim=-1).indices
    return z.gather(-1, i).softmax(-1), i


def limited_to_one_group_by_reshape(m, z):
    p = z.sigmoid()
    g = p.reshape(-1, 2, 4).amax(-1).argmax(-1)
    inside = p.reshape(-1, 2, 4)[torch.arange(z.shape[0]), g]
    w, i = inside.topk(2, -1)
    return w / w.sum(-1, keepdim=True), i + 4 * g.unsqueeze(-1)


for _route, _parts in (
    (best_by_argsort, {}),
    (kept_by_threshold_of_the_kth, {}),
    (bias_added_before_softmax, {"bias": torch.zeros(8)}),
    (chosen_under_no_grad, {}),
    (limited_to_one_group_by_reshape, {}),
):

    def _build(route=_route, parts=_parts):
        return Sparse(route, **{k: v.clone() for k, v in parts.items()}), seq(8, 8)

    _build.__name__ = f"route_{_route.__name__}"
    case(truncation(8))(_build)


@case(truncation(4))
def dense_experts_under_a_mask():
    def forward(m, x):
        p = F.softmax(m.gate(x), dim=-1)
        index = p.topk(2, dim=-1)[1]
        mask = torch.zeros_like(p).scatter(1, index, 1.0)
        w = p * mask
        w = w / w.sum(-1, keepdim=True)
        return torch.einsum("ne,neo->no", w, torch.stack([f(x) for f in m.experts], 1))

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), vec()


@case(truncation(4))
def switch_by_boolean_rows():
    def forward(m, x):
        p, index = torch.max(torch.softmax(m.gate(x), -1), dim=-1)
        out = torch.zeros_like(x)
        for e in range(4):
            rows = (index == e).nonzero(as_tuple=True)[0]
            out = out.index_copy(0, rows, m.experts[e](x.index_select(0, rows)))
        return out * p.unsqueeze(1)

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), vec()


@case(truncation(4))
def first_choice_straight_through():
    """Top-1 one-hot with the softmax as its gradient, times every expert's output."""

    def forward(m, x):
        soft = m.gate(x).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), 4).type_as(soft)
        gate = hard + soft - soft.detach()
        return (gate.unsqueeze(-1) * torch.stack([f(x) for f in m.experts], 1)).sum(1)

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), vec()


@case(truncation(4), TWO_WAY)
def experts_with_biases_in_a_batch():
    """Every expert on every token by baddbmm with GELU's tanh form inside; weights scattered to all experts."""

    def forward(m, x):
        w, index = torch.topk(F.softmax(m.gate(x), dim=1), 2, dim=-1)
        full = torch.zeros(64, 4).index_put((torch.arange(64).unsqueeze(1), index), w)
        h = torch.baddbmm(m.b1.unsqueeze(1), x.expand(4, -1, -1), m.w1)
        h = torch.baddbmm(m.b2.unsqueeze(1), F.gelu(h, approximate="tanh"), m.w2)
        return torch.einsum("ne,ned->nd", full, h.transpose(0, 1))

    sizes = {"w1": (4, 16, 24), "b1": (4, 24), "w2": (4, 24, 16), "b2": (4, 16)}
    return Net(forward, gate=nn.Linear(16, 4), **{n: torch.randn(*s) for n, s in sizes.items()}), vec()
