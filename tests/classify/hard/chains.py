"""Sinkhorn iterations and recursions over chains."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.classify.hard.common import (
    Attention,
    Net,
    case,
    kernel,
    selection,
    seq,
    softmax,
)


# ---- Sinkhorn -------------------------------------------------------------------------------------
@case(softmax(6))
def sinkhorn_of_attention_scores():
    def core(m, q, k, v):
        log = q @ k.mT / math.sqrt(8)
        for _ in range(4):
            log = log - torch.logsumexp(log, dim=-1, keepdim=True)
            log = log - torch.logsumexp(log, dim=-2, keepdim=True)
        return log.exp() @ v

    return Attention(core), seq()


@case(softmax(7))
def optimal_matching_with_dustbin():
    """Log-domain Sinkhorn by its potentials, with a learned score for "no partner" (SuperGlue)."""

    def forward(m, a, b):
        a, b = m.a(a), m.b(b)
        scores = torch.einsum("bnd,bmd->bnm", a, b) / 4
        bins = m.bin.expand(4, 6, 1)
        z = torch.cat([torch.cat([scores, bins], -1), torch.cat([bins.mT, m.bin.expand(4, 1, 1)], -1)], 1)
        norm = -math.log(12)
        mu = torch.cat([torch.full((6,), norm), torch.tensor([math.log(6) + norm])]).expand(4, -1)
        u = v = torch.zeros_like(mu)
        for _ in range(5):
            u = mu - torch.logsumexp(z + v.unsqueeze(1), dim=2)
            v = mu - torch.logsumexp(z + u.unsqueeze(2), dim=1)
        return z + u.unsqueeze(2) + v.unsqueeze(1) - norm

    net = Net(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), bin=torch.tensor(1.0))
    return net, (torch.randn(4, 6, 16), torch.randn(4, 6, 16))


@case(softmax(6))
def transport_by_scaling_vectors():
    """The plan diag(u) K diag(v) with u = a / Kv and v = b / K'u."""

    def forward(m, x):
        cost = torch.cdist(m.a(x), m.points)
        gibbs = torch.exp(-cost / 0.5)
        u = torch.ones(4, 6) / 6
        v = torch.ones(4, 6) / 6
        for _ in range(5):
            u = (1 / 6) / (torch.einsum("bnm,bm->bn", gibbs, v) + 1e-8)
            v = (1 / 6) / (torch.einsum("bnm,bn->bm", gibbs, u) + 1e-8)
        plan = u.unsqueeze(-1) * gibbs * v.unsqueeze(1)
        return (plan * cost).sum((1, 2))

    return Net(forward, a=nn.Linear(16, 8), points=torch.randn(6, 8)), seq()


@case(softmax(4))
def doubly_stochastic_residual_mixing():
    """A 4 x 4 mixing of residual streams per token: softmax, then rows and columns in turn (hyper-connections)."""

    def forward(m, x):
        mix = m.alpha * m.mix(x).unflatten(-1, (4, 4)) + m.bias
        mix = torch.softmax(mix, -1) + 1e-6
        mix = mix / (mix.sum(-2, keepdim=True) + 1e-6)
        for _ in range(3):
            mix = mix / (mix.sum(-1, keepdim=True) + 1e-6)
            mix = mix / (mix.sum(-2, keepdim=True) + 1e-6)
        return torch.einsum("btij,btjd->btid", mix, x.unflatten(-1, (4, 4)))

    return Net(forward, mix=nn.Linear(16, 16), alpha=torch.tensor(0.1), bias=torch.eye(4)), seq()


@case(softmax(6))
def permutation_of_parameters():
    """Gumbel-Sinkhorn without noise on a learned matrix: no input reaches the mixing itself."""

    def forward(m, x):
        log = m.scores / 0.5
        for _ in range(4):
            log = log - log.logsumexp(1, keepdim=True)
            log = log - log.logsumexp(0, keepdim=True)
        return m.fc(log.exp() @ x)

    return Net(forward, scores=torch.randn(6, 6), fc=nn.Linear(16, 4)), seq()


# ---- chains ---------------------------------------------------------------------------------------
@case(softmax(5))
def chain_partition_with_mask():
    """The normalizer of a linear-chain CRF: start, transitions, end; padded steps keep the old score."""

    def forward(m, x):
        emissions = m.emit(x).transpose(0, 1)
        mask = torch.ones(6, 4, dtype=torch.bool)
        mask[4:, 1] = False
        score = m.start + emissions[0]
        for i in range(1, 6):
            nxt = score.unsqueeze(2) + m.transitions + emissions[i].unsqueeze(1)
            nxt = torch.logsumexp(nxt, dim=1)
            score = torch.where(mask[i].unsqueeze(1), nxt, score)
        return torch.logsumexp(score + m.end, dim=1)

    parts = {"start": torch.randn(5), "end": torch.randn(5), "transitions": torch.randn(5, 5)}
    return Net(forward, emit=nn.Linear(16, 5), **parts), seq()


@case(softmax(5))
def chain_likelihood_with_hand_written_logsumexp():
    def log_sum_exp(t, dim):
        top, _ = t.max(dim)
        return top + (t - top.unsqueeze(dim)).exp().sum(dim).log()

    def forward(m, x):
        e = m.emit(x)
        tags = torch.arange(6).expand(4, 6) % 5
        alpha = e[:, 0]
        for t in range(1, 6):
            alpha = log_sum_exp(alpha.unsqueeze(-1) + m.transitions, 1) + e[:, t]
        gold = e.gather(2, tags.unsqueeze(-1)).squeeze(-1).sum(1) + m.transitions[tags[:, :-1], tags[:, 1:]].sum(1)
        return log_sum_exp(alpha, -1) - gold

    return Net(forward, emit=nn.Linear(16, 5), transitions=torch.randn(5, 5)), seq()


@case(selection(5), also=[[selection(5), selection(5)]])
def viterbi_decoding():
    def forward(m, x):
        e = m.emit(x)
        score, back = e[:, 0], []
        for t in range(1, 6):
            best, index = (score.unsqueeze(2) + m.transitions).max(dim=1)
            score = best + e[:, t]
            back.append(index)
        last = score.argmax(-1)
        path = [last]
        for index in reversed(back):
            path.append(index.gather(1, path[-1].unsqueeze(1)).squeeze(1))
        return torch.stack(path[::-1], 1)

    return Net(forward, emit=nn.Linear(16, 5), transitions=torch.randn(5, 5)), seq()


@case(softmax(4), softmax(4), also=[[softmax(4), kernel(4)], [softmax(4), kernel(4), kernel(4)]])
def hidden_markov_forward_scaled():
    """Probabilities rescaled to one at every step, the log of the scales added up."""

    def forward(m, x):
        likelihood = torch.exp(m.emit(x))
        move = m.move.softmax(-1)
        alpha, total = likelihood[:, 0] / 4, 0
        for t in range(1, 6):
            scale = alpha.sum(-1, keepdim=True)
            total = total + scale.log()
            alpha = (alpha / scale) @ move * likelihood[:, t]
        return total + alpha.sum(-1, keepdim=True).log()

    return Net(forward, emit=nn.Linear(16, 4), move=torch.randn(4, 4)), seq()
