"""Mixtures of experts: how the experts are reached, and mixtures where every expert keeps a share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    TWO_WAY,
    Net,
    case,
    linears,
    selection,
    seq,
    softmax,
    truncation,
    vec,
)
from tests.classify.hard.routers import mixtral


# ---- how the experts are reached ------------------------------------------------------------------
@case(truncation(4))
def switch_with_capacity():
    """``one_hot(argmax)``, tokens beyond an expert's capacity dropped by a running count, a loop over experts."""

    def forward(m, x):
        flat = x.reshape(-1, 16)
        p = F.softmax(m.gate(flat), dim=-1)
        index = F.one_hot(torch.argmax(p, dim=-1), num_classes=4)
        index = index * (torch.cumsum(index, dim=-2) <= 20)
        top = torch.max(p, dim=-1).values.unsqueeze(-1)
        out = flat.clone()
        for e, expert in enumerate(m.experts):
            rows = index[:, e].bool()
            out[rows] = expert(flat[rows])
        return (top * out).view_as(x)

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), seq(8, 8)


@case(truncation(4))
def switch_by_dispatch_and_combine_einsum():
    def forward(m, x):
        p = m.gate(x).softmax(-1)
        gate, index = p.max(-1)
        mask = F.one_hot(index, 4).float()
        position = (mask.cumsum(0) - 1) * mask
        mask = mask * (position < 24).float()
        slot = F.one_hot(position.sum(-1).long().clamp(max=23), 24).float()
        combine = gate[:, None, None] * mask.unsqueeze(-1) * slot.unsqueeze(1)
        dispatch = (combine > 0).float()
        inside = torch.einsum("nec,nd->ecd", dispatch, x)
        return torch.einsum("nec,ecd->nd", combine, torch.einsum("ecd,edf->ecf", inside, m.w))

    return Net(forward, gate=nn.Linear(16, 4), w=torch.randn(4, 16, 16)), vec()


@case(truncation(4))
def experts_in_a_module_list_by_where():
    def forward(m, x):
        w, chosen = torch.topk(m.gate(x), 2)
        w = F.softmax(w, dim=1, dtype=torch.float).to(x.dtype)
        out = torch.zeros_like(x)
        for e, expert in enumerate(m.experts):
            token, nth = torch.where(chosen == e)
            out[token] += w[token, nth, None] * expert(x[token])
        return out

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), vec()


@case(truncation(4), TWO_WAY, TWO_WAY, TWO_WAY, TWO_WAY)
def gated_experts_each_with_its_own_silu():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)

        def forward(self, x):
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def forward(m, x):
        w, chosen = mixtral(m, m.gate(x))
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, 4).permute(2, 1, 0)
        for e, expert in enumerate(m.experts):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, expert(x[None, token].reshape(-1, 16)) * w[token, slot, None])
        return out

    return Net(forward, gate=nn.Linear(16, 4), experts=nn.ModuleList(Expert() for _ in range(4))), vec()


@case(truncation(4), TWO_WAY)
def batched_experts_over_every_token():
    """All experts run on all tokens by one batched product; the router's zeros drop what was not chosen."""

    def forward(m, x):
        v, i = torch.topk(m.gate(x), 2, dim=-1)
        scores = torch.zeros(64, 4).scatter(1, i, v.softmax(-1))
        h = torch.bmm(x.unsqueeze(0).expand(4, -1, -1), m.gate_up)
        gate, up = h.chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), m.down)
        return (out * scores.t().unsqueeze(-1)).sum(0)

    return Net(forward, gate=nn.Linear(16, 4), gate_up=torch.randn(4, 16, 48), down=torch.randn(4, 24, 16)), vec()


def sorted_by_expert(x, w, chosen, n):
    flat = chosen.view(-1)
    order = flat.argsort()
    counts = torch.histc(flat.float(), bins=n, min=0, max=n - 1).long()
    token = order // chosen.shape[1]
    return x[token], w.view(-1)[order], counts, token


@case(truncation(4), TWO_WAY)
def tokens_sorted_by_expert_and_split():
    """Integer sorts and counts, one product per run of equal experts (Granite, JetMoE)."""

    def forward(m, x):
        v, chosen = m.gate(x).topk(2, dim=1)
        inside, w, counts, token = sorted_by_expert(x, v.softmax(1), chosen, 4)
        parts = inside.split(counts.tolist(), dim=0)
        h = torch.cat([F.linear(part, m.up[e]) for e, part in enumerate(parts)], 0)
        a, b = h.chunk(2, -1)
        h = F.silu(a) * b
        y = torch.cat([F.linear(part, m.down[e]) for e, part in enumerate(h.split(counts.tolist(), 0))], 0)
        return torch.zeros_like(x).index_add(0, token, y * w[:, None])

    return Net(forward, gate=nn.Linear(16, 4), up=torch.randn(4, 48, 16), down=torch.randn(4, 16, 24)), vec()


@case(truncation(4), TWO_WAY)
def grouped_matrix_products():
    def forward(m, x):
        v, chosen = F.softmax(m.gate(x), -1).topk(2, dim=-1)
        inside, w, counts, token = sorted_by_expert(x, v / v.sum(-1, keepdim=True), chosen, 4)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        h = torch._grouped_mm(inside.bfloat16(), m.up.bfloat16(), offs=offsets)
        y = torch._grouped_mm(F.silu(h), m.down.bfloat16(), offs=offsets).type_as(x)
        return torch.zeros_like(x).index_add_(0, token, y * w.unsqueeze(-1))

    return Net(forward, gate=nn.Linear(16, 4), up=torch.randn(4, 16, 24), down=torch.randn(4, 24, 16)), vec()


@case(truncation(4))
def weights_gathered_per_token_and_restored_order():
    def forward(m, x):
        w, chosen = m.gate(x).sigmoid().topk(2, dim=-1)
        order = torch.argsort(chosen.view(-1), stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        bounds = torch.bincount(chosen.view(-1), minlength=4).cumsum(0).tolist()
        grouped = x.repeat_interleave(2, dim=0)[order]
        out, start = [], 0
        for e, end in enumerate(bounds):
            out.append(grouped[start:end] @ m.w[e])
            start = end
        y = torch.cat(out)[inverse].view(64, 2, 16)
        return torch.einsum("nkd,nk->nd", y, w)

    return Net(forward, gate=nn.Linear(16, 4), w=torch.randn(4, 16, 16)), vec()


@case(truncation(4))
def experts_gathered_and_multiplied():
    def forward(m, x):
        p, i = m.gate(x).softmax(-1).topk(2, -1)
        w = torch.index_select(m.w, 0, i.flatten()).view(64, 2, 16, 16)
        return (torch.matmul(x[:, None, None], w).squeeze(2) * p.unsqueeze(-1)).sum(1)

    return Net(forward, gate=nn.Linear(16, 4), w=torch.randn(4, 16, 16)), vec()


@case(truncation(4))
def outputs_stacked_then_gathered():
    def forward(m, x):
        p, i = m.gate(x).softmax(-1).topk(2, -1)
        every = torch.stack([expert(x) for expert in m.experts], dim=1)
        return (every.gather(1, i.unsqueeze(-1).expand(-1, -1, 16)) * p.unsqueeze(-1)).sum(1)

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), vec()


@case(truncation(4))
def probabilities_times_is_the_largest():
    def forward(m, x):
        p = m.gate(x).softmax(-1)
        p = p * (p == p.amax(-1, keepdim=True))
        return sum(p[:, e, None] * expert(x) for e, expert in enumerate(m.experts))

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), vec()


@case(truncation(4))
def noisy_top_k_gating():
    """Shazeer's gates: the top k logits scattered into zeros; experts fed by nonzero and split by counts."""

    def forward(m, x):
        z = x @ m.w_gate
        top, index = z.topk(3, dim=1)
        gates = torch.zeros_like(z).scatter(1, index[:, :2], torch.softmax(top[:, :2], 1))
        order, by_expert = torch.nonzero(gates).sort(0)
        token = torch.nonzero(gates)[by_expert[:, 1], 0]
        counts = (gates > 0).sum(0).tolist()
        weight = torch.gather(gates[token], 1, order[:, 1:])
        parts = torch.split(x[token], counts, dim=0)
        y = torch.cat([m.experts[e](parts[e]) for e in range(4)], 0) * weight
        return torch.zeros(64, 16).index_add(0, token, y)

    return Net(forward, w_gate=torch.randn(16, 4), experts=linears(4)), vec()


@case(truncation(4), TWO_WAY)
def shared_expert_behind_its_own_gate():
    def forward(m, x):
        w, i = mixtral(m, m.gate(x))
        routed = torch.einsum("nk,nd,nkdo->no", w, x, m.w[i])
        return routed + torch.sigmoid(m.shared_gate(x)) * m.shared(x)

    parts = {"gate": nn.Linear(16, 4), "shared_gate": nn.Linear(16, 1), "shared": nn.Linear(16, 8)}
    return Net(forward, w=torch.randn(4, 16, 8), **parts), vec()


@case(truncation(4), truncation(4))
def two_sparse_blocks():
    def forward(m, x):
        for gate, w in ((m.g1, m.w1), (m.g2, m.w2)):
            p, i = mixtral(m, gate(F.layer_norm(x, (16,))))
            x = x + torch.einsum("nk,nd,nkdo->no", p, x, w[i])
        return x

    tables = {"w1": torch.randn(4, 16, 16), "w2": torch.randn(4, 16, 16)}
    return Net(forward, g1=nn.Linear(16, 4), g2=nn.Linear(16, 4), **tables), vec()


@case(truncation(4), also=[[selection(4)]])
def one_expert_per_sequence():
    """The sentence chooses: one expert for all its tokens, in a Python loop over samples."""

    def forward(m, x):
        choice = m.gate(x.mean(1)).argmax(-1)
        return torch.stack([m.experts[int(e)](h) for e, h in zip(choice, x, strict=True)])

    return Net(forward, gate=nn.Linear(16, 4), experts=linears(4)), seq(16)


# ---- every expert keeps a share -------------------------------------------------------------------
@case(softmax(6), softmax(8))
def soft_mixture_of_experts():
    """Slots are averages of tokens, tokens averages of slots: two normalizations of one score (Soft MoE)."""

    def forward(m, x):
        scores = torch.einsum("btd,esd->btes", F.normalize(x, dim=-1), m.scale * F.normalize(m.phi, dim=-1))
        dispatch = scores.softmax(1)
        combine = scores.flatten(2).softmax(-1).view_as(scores)
        slots = torch.einsum("btes,btd->besd", dispatch, x)
        out = torch.stack([expert(slots[:, e]) for e, expert in enumerate(m.experts)], 1)
        return torch.einsum("btes,besd->btd", combine, out)

    return Net(forward, phi=torch.randn(4, 2, 16), scale=torch.ones(1), experts=linears(4)), seq()


@case(softmax(3), softmax(3))
def one_gate_per_task():
    """Multi-gate mixture: every task has its own softmax over the shared experts."""

    def forward(m, x):
        experts = torch.stack([e(x) for e in m.experts], 1)
        return [
            head((g(x).softmax(-1).unsqueeze(1) @ experts).squeeze(1)) for g, head in zip(m.gates, m.heads, strict=True)
        ]

    return Net(forward, experts=linears(3), gates=linears(2, 16, 3), heads=linears(2, 16, 1)), vec()


@case(softmax(4))
def kernels_mixed_by_attention():
    """Dynamic convolution: a softmax over four kernels mixes their weights before one convolution per sample."""

    def forward(m, x):
        a = F.softmax(m.fc(x.mean((2, 3))) / 30, dim=1)
        weight = torch.mm(a, m.weight.view(4, -1)).view(-1, 3, 3, 3)
        b, c, h, w = x.shape
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return out.view(b, -1, h, w)

    return Net(forward, fc=nn.Linear(3, 4), weight=torch.randn(4, 3, 3, 3, 3)), (torch.randn(4, 3, 8, 8),)


@case(TWO_WAY)
def kernels_mixed_by_sigmoids():
    def forward(m, x):
        a = torch.sigmoid(m.fc(x.mean((2, 3))))
        weight = (a @ m.weight.flatten(1)).view(-1, 3, 3, 3)
        b, c, h, w = x.shape
        return F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b).view(b, -1, h, w)

    return Net(forward, fc=nn.Linear(3, 4), weight=torch.randn(4, 3, 3, 3, 3)), (torch.randn(4, 3, 8, 8),)
