"""Running sums, matchings and chains in a second and third spelling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    THRESHOLD,
    TWO_WAY,
    Attention,
    Net,
    case,
    kernel,
    seq,
    softmax,
    vec,
)


# ---- running sums ---------------------------------------------------------------------------------
@case(softmax(None), TWO_WAY)
def wkv_as_a_matrix():
    """RWKV 4 in parallel: a triangle of decays, the current token's bonus on the diagonal."""

    def forward(m, x):
        k, v, r = m.k(x), m.v(x), torch.sigmoid(m.r(x))
        steps = torch.arange(6)
        gap = (steps[:, None] - steps - 1).clamp(min=0).unsqueeze(-1)
        w = -torch.exp(m.decay) * gap
        w = torch.where((steps[:, None] == steps).unsqueeze(-1), m.first, w)
        w = w.masked_fill((steps[:, None] < steps).unsqueeze(-1), -math.inf)
        e = torch.exp(w.unsqueeze(0) + k.unsqueeze(1) - k.amax((1, 2), keepdim=True).unsqueeze(1))
        return m.o(r * torch.einsum("btsc,bsc->btc", e, v) / e.sum(2))

    layers = {n: nn.Linear(16, 16) for n in "kvro"}
    return Net(forward, decay=torch.randn(16), first=torch.randn(16), **layers), seq()


@case(softmax(None), TWO_WAY, TWO_WAY, TWO_WAY, also=[[softmax(None), TWO_WAY, TWO_WAY, TWO_WAY, TWO_WAY]])
def exponential_gates_with_recurrent_weights():
    """sLSTM whose gates also see the last hidden state; sigmoid forget gate, unstabilized."""

    def forward(m, x):
        h = c = n = torch.zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            both = torch.cat([x[:, t], h], -1)
            i, f = torch.exp(m.i(both)), torch.sigmoid(m.f(both))
            c = f * c + i * torch.tanh(m.z(both))
            n = f * n + i
            h = torch.sigmoid(m.o(both)) * (c / n)
        return h

    return Net(forward, **{n: nn.Linear(24, 8) for n in "ifzo"}), seq()


@case(softmax(6))
def flash_attention_over_blocks_of_queries_too():
    def core(m, q, k, v):
        out = torch.empty_like(q)
        for i in range(0, 6, 3):
            qi = q[:, :, i : i + 3]
            o = torch.zeros_like(qi)
            l = torch.zeros_like(qi[..., :1])  # noqa: E741
            top = torch.full_like(l, torch.finfo(q.dtype).min)
            for j in range(0, 6, 2):
                s = torch.einsum("bhid,bhjd->bhij", qi, k[:, :, j : j + 2]) * 8**-0.5
                block_top = s.max(dim=-1, keepdim=True).values
                p = torch.exp(s - block_top)
                new = torch.maximum(top, block_top)
                a, b = torch.exp(top - new), torch.exp(block_top - new)
                new_l = a * l + b * p.sum(-1, keepdim=True)
                o = (l * a * o + b * (p @ v[:, :, j : j + 2])) / new_l
                top, l = new, new_l  # noqa: E741
            out[:, :, i : i + 3] = o
        return out

    return Attention(core), seq()


@case(softmax(6))
def chunks_of_a_long_softmax_joined_before_the_sum():
    def core(m, q, k, v):
        s = torch.cat([q @ part.mT for part in k.split(2, 2)], -1) / math.sqrt(8)
        e = torch.exp(s - s.amax(-1, keepdim=True))
        z = sum(part.sum(-1, keepdim=True) for part in e.split(2, -1))
        return sum(part @ vp for part, vp in zip(e.split(2, -1), v.split(2, 2), strict=True)) / z

    return Attention(core), seq()


@case(kernel(None), THRESHOLD, THRESHOLD, also=[[kernel(None)], [kernel(None), THRESHOLD]])
def linear_attention_in_causal_chunks():
    def core(m, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        s = z = 0
        out = []
        for qc, kc, vc in zip(q.split(3, 2), k.split(3, 2), v.split(3, 2), strict=True):
            a = (qc @ kc.mT).tril()
            num = a @ vc + (qc @ s if len(out) else 0)
            den = a.sum(-1, keepdim=True) + ((qc * z.unsqueeze(2)).sum(-1, keepdim=True) if len(out) else 0)
            out.append(num / (den + 1e-6))
            s, z = s + kc.mT @ vc, z + kc.sum(2)
        return torch.cat(out, 2)

    return Attention(core), seq()


@case(softmax(6), also=[[kernel(6)]])
def linear_attention_of_exponential_features():
    def core(m, q, k, v):
        q, k = torch.exp(q), torch.exp(k)
        return (q @ (k.mT @ v)) / (q @ k.sum(2).unsqueeze(-1))

    return Attention(core), seq()


@case(softmax(None))
def decayed_average_by_exponentials():
    """An exponential average of tokens in which each token sets its own weight."""

    def forward(m, x):
        w, v = torch.exp(m.w(x)), m.v(x)
        num, den, out = 0, 0, []
        for t in range(x.shape[1]):
            num, den = 0.9 * num + w[:, t] * v[:, t], 0.9 * den + w[:, t]
            out.append(num / den)
        return torch.stack(out, 1)

    return Net(forward, w=nn.Linear(16, 1), v=nn.Linear(16, 8)), seq()


# ---- Sinkhorn, CRF, priors ------------------------------------------------------------------------
@case(softmax(6))
def alternating_normalization_by_norms():
    def core(m, q, k, v):
        p = torch.exp(q @ k.mT / math.sqrt(8))
        for _ in range(3):
            p = F.normalize(p, p=1, dim=-1)
            p = F.normalize(p, p=1, dim=-2)
        return p @ v

    return Attention(core), seq()


@case(softmax(6))
def transport_in_the_log_domain_with_marginals():
    def forward(m, x, y):
        cost = torch.cdist(m.a(x), m.a(y))
        log_k = -cost / 0.2
        log_mu = torch.full((4, 6), -math.log(6))
        f = g = torch.zeros(4, 6)
        for _ in range(4):
            f = log_mu - torch.logsumexp(log_k + g[:, None, :], dim=2)
            g = log_mu - torch.logsumexp(log_k + f[:, :, None], dim=1)
        return (torch.exp(log_k + f[:, :, None] + g[:, None, :]) * cost).sum((1, 2))

    return Net(forward, a=nn.Linear(16, 8)), (torch.randn(4, 6, 16), torch.randn(4, 6, 16))


@case(softmax(5), TWO_WAY)
def tagger_with_a_chain():
    """A bidirectional LSTM under a chain whose partition is found tag by tag in Python."""

    def forward(m, x):
        e = m.emit(m.rnn(x)[0])
        total = []
        for sentence in e:
            alpha = sentence[0]
            for step in sentence[1:]:
                alpha = torch.stack([torch.logsumexp(alpha + m.transitions[j] + step[j], 0) for j in range(5)])
            total.append(torch.logsumexp(alpha, 0))
        return torch.stack(total)

    rnn = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
    return Net(forward, rnn=rnn, emit=nn.Linear(16, 5), transitions=torch.randn(5, 5)), seq(2, 4)


@case(softmax(6))
def adaptive_adjacency():
    """Graph WaveNet: a softmax of relu of a product of node embeddings, all parameters."""

    def forward(m, x):
        a = F.softmax(F.relu(m.e1 @ m.e2.T), dim=1)
        return m.fc(torch.einsum("btd,ts->bsd", x, a))

    return Net(forward, e1=torch.randn(6, 4), e2=torch.randn(6, 4), fc=nn.Linear(16, 8)), seq()


@case(softmax(32))
def soft_codes():
    def forward(m, x):
        z = m.enc(x)
        d = (z.unsqueeze(1) - m.book.weight).pow(2).sum(-1)
        return m.dec(F.softmax(-d / 0.1, dim=-1) @ m.book.weight)

    return Net(forward, enc=nn.Linear(16, 4), book=nn.Embedding(32, 4), dec=nn.Linear(4, 16)), vec()
