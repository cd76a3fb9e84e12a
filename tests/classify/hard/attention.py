"""Attention with biases, temperatures, latent projections and learned queries, and what is no softmax."""

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
    heads,
    kernel,
    linears,
    merge,
    seq,
    softmax,
    truncation,
)


# ---- biases, temperatures, mixtures of heads ------------------------------------------------------
@case(softmax(6))
def relative_position_buckets():
    def core(m, q, k, v):
        distance = torch.arange(6)[None, :] - torch.arange(6)[:, None]
        near = distance.abs() < 4
        far = 4 + (torch.log(distance.abs().float().clamp(min=1) / 4) / math.log(8 / 4) * 4).long()
        bucket = torch.where(near, distance.abs(), torch.min(far, torch.full_like(far, 7)))
        bias = m.bias(bucket).permute(2, 0, 1).unsqueeze(0)
        return F.dropout((q @ k.mT + bias).float().softmax(-1).type_as(q), 0.1, m.training) @ v

    return Attention(core, bias=nn.Embedding(8, 2)), seq()


@case(softmax(6))
def linear_biases_by_baddbmm():
    def core(m, q, k, v):
        slopes = torch.tensor([0.5, 0.25])
        alibi = (slopes.view(2, 1, 1) * torch.arange(6)).repeat(4, 1, 1)
        s = alibi.baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, beta=1.0, alpha=8**-0.5).view(4, 2, 6, 6)
        s = torch.masked_fill(s, torch.ones(6, 6).triu(1).bool(), torch.finfo(s.dtype).min)
        return F.softmax(s, dim=-1) @ v

    return Attention(core), seq()


@case(softmax(6))
def cosine_attention_with_clamped_temperature():
    def core(m, q, k, v):
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scale = torch.clamp(m.scale, max=math.log(1.0 / 0.01)).exp()
        return (s * scale).softmax(-1) @ v

    return Attention(core, scale=torch.log(10 * torch.ones(2, 1, 1))), seq()


@case(softmax(6))
def talking_heads():
    def core(m, q, k, v):
        s = m.before((q @ k.mT).permute(0, 2, 3, 1))
        return m.after(s.softmax(2)).permute(0, 3, 1, 2) @ v

    return Attention(core, before=nn.Linear(2, 2), after=nn.Linear(2, 2)), seq()


@case(softmax(6))
def differential_attention_of_paired_heads():
    def core(m, q, k, v):
        p = F.softmax(q @ k.mT / math.sqrt(8), dim=-1)
        lam = torch.exp((m.lq1 * m.lk1).sum()) - torch.exp((m.lq2 * m.lk2).sum()) + 0.2
        p = p.view(4, 1, 2, 6, 6)
        return (p[:, :, 0] - lam * p[:, :, 1]).expand(-1, 2, -1, -1) @ v

    return Attention(core, **{n: torch.randn(8) * 0.1 for n in ("lq1", "lk1", "lq2", "lk2")}), seq()


@case(softmax(6), softmax(6))
def differential_attention_of_two_projections():
    def forward(m, x):
        a = (m.q1(x) @ m.k1(x).mT / 4).softmax(-1)
        b = (m.q2(x) @ m.k2(x).mT / 4).softmax(-1)
        return (a - m.lam * b) @ m.v(x)

    parts = {n: nn.Linear(16, 16) for n in ("q1", "k1", "q2", "k2", "v")}
    return Net(forward, lam=torch.tensor(0.5), **parts), seq()


@case(softmax(6))
def latent_attention():
    """Queries and keys/values through low-rank latents, a rotary part apart, values narrower than keys (MLA)."""

    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def rotate(t, cos, sin):
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    def forward(m, x):
        q = m.q_b(norm(m.q_a(x))).view(4, 6, 2, 12).transpose(1, 2)
        q_nope, q_pe = q.split([8, 4], -1)
        latent, k_pe = m.kv_a(x).split([10, 4], -1)
        kv = m.kv_b(norm(latent)).view(4, 6, 2, 14).transpose(1, 2)
        k_nope, v = kv.split([8, 6], -1)
        angle = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.01])).repeat(1, 2)
        q = torch.cat([q_nope, rotate(q_pe, angle.cos(), angle.sin())], -1)
        k_pe = rotate(k_pe.unsqueeze(1), angle.cos(), angle.sin()).expand(-1, 2, -1, -1)
        k = torch.cat([k_nope, k_pe], -1)
        return m.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    layers = {"q_a": nn.Linear(16, 8), "q_b": nn.Linear(8, 24), "kv_a": nn.Linear(16, 14), "kv_b": nn.Linear(10, 28)}
    return Net(forward, o=nn.Linear(12, 16), **layers), seq()


@case(softmax(6))
def latent_attention_absorbed():
    """The up-projections are folded into the queries and the output, scores are taken on the latent itself."""

    def forward(m, x):
        q = m.q(x).view(4, 6, 2, 8)
        latent = F.layer_norm(m.kv(x), (10,))
        s = torch.einsum("bqhc,bkc->bhqk", torch.einsum("bqhd,hdc->bqhc", q, m.up_k), latent) * 8**-0.5
        s = s + torch.full((6, 6), -math.inf).triu(1)
        mixed = torch.einsum("bhqk,bkc->bqhc", s.softmax(-1, dtype=torch.float32), latent)
        return m.o(torch.einsum("bqhc,hdc->bqhd", mixed, m.up_v).flatten(2))

    up = {"up_k": torch.randn(2, 8, 10), "up_v": torch.randn(2, 8, 10)}
    return Net(forward, q=nn.Linear(16, 16), kv=nn.Linear(16, 10), o=nn.Linear(16, 16), **up), seq()


@case(softmax(6))
def grouped_queries_with_repeated_keys():
    def forward(m, x):
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(4, 4, 6, 4) for t in (k, v))
        s = torch.matmul(q, k.transpose(2, 3)) * 0.5
        s = s + torch.triu(torch.full((6, 6), torch.finfo(s.dtype).min), diagonal=1)[None, None]
        return merge(torch.matmul(F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype), v))

    return Net(forward, q=nn.Linear(16, 16), k=nn.Linear(16, 8), v=nn.Linear(16, 8)), seq()


@case(softmax(3))
def keys_projected_along_the_length():
    def core(m, q, k, v):
        k, v = (torch.einsum("bhtd,tn->bhnd", t, e) for t, e in ((k, m.e), (v, m.f)))
        return F.softmax(q @ k.mT / math.sqrt(8), -1) @ v

    return Attention(core, e=torch.randn(6, 3), f=torch.randn(6, 3)), seq()


@case(softmax(2), softmax(2), softmax(6))
def nystroem_attention():
    """Three softmax kernels with landmarks, the middle one inverted by Newton steps."""

    def core(m, q, k, v):
        q = q / 8**0.5
        ql, kl = (t.reshape(4, 2, 2, 3, 8).mean(-2) for t in (q, k))
        k1 = F.softmax(q @ kl.mT, -1)
        k2 = F.softmax(ql @ kl.mT, -1)
        k3 = F.softmax(ql @ k.mT, -1)
        inv = k2.mT / (k2.sum(-2).max() * k2.sum(-1).max())
        for _ in range(4):
            kv = k2 @ inv
            eye = torch.eye(2)
            inv = 0.25 * inv @ (13 * eye - kv @ (15 * eye - kv @ (7 * eye - kv)))
        return (k1 @ inv) @ (k3 @ v)

    return Attention(core), seq()


@case(softmax(6))
def cross_attention_of_learned_latents():
    def forward(m, x):
        q = heads(m.q(m.latents.unsqueeze(0).expand(x.shape[0], -1, -1)))
        k, v = m.kv(x).chunk(2, -1)
        return merge((q @ heads(k).mT / math.sqrt(8)).softmax(-1) @ heads(v))

    return Net(forward, q=nn.Linear(16, 16), kv=nn.Linear(16, 32), latents=torch.randn(3, 16)), seq()


@case(softmax(6), softmax(5))
def axial_attention():
    def attend(layer, x):
        q, k, v = layer(x).chunk(3, -1)
        return F.softmax(q @ k.mT, -1) @ v

    def forward(m, x):
        return attend(m.rows, x) + attend(m.columns, x.transpose(1, 2)).transpose(1, 2)

    return Net(forward, rows=nn.Linear(8, 24), columns=nn.Linear(8, 24)), (torch.randn(2, 5, 6, 8),)


@case(softmax(6), softmax(4))
def pooling_by_seeds_then_attention_among_them():
    def forward(m, x):
        s = m.a(m.seeds.expand(4, -1, -1), x, x, need_weights=False)[0]
        return m.b(s, s, s)[0]

    make = nn.MultiheadAttention
    net = Net(forward, a=make(16, 2, batch_first=True), b=make(16, 4, batch_first=True), seeds=torch.randn(1, 4, 16))
    return net, seq()


@case(softmax(6))
def learned_attention_matrix():
    """The scores are a parameter (random synthesizer): alternatives are the positions, no query asks."""

    def forward(m, x):
        return m.o(F.softmax(m.scores, dim=-1) @ m.v(x))

    return Net(forward, v=nn.Linear(16, 16), o=nn.Linear(16, 16), scores=torch.randn(6, 6)), seq()


@case(softmax(12))
def keys_of_a_cache_and_the_new_ones():
    def forward(m, x, past):
        k = torch.cat([past[:, :, 0], heads(m.k(x))], 2)
        v = torch.cat([past[:, :, 1], heads(m.v(x))], 2)
        mask = torch.ones(6, 12, dtype=torch.bool).tril(6)
        return merge(F.scaled_dot_product_attention(heads(m.q(x)), k, v, attn_mask=mask))

    net = Net(forward, q=nn.Linear(16, 16), k=nn.Linear(16, 16), v=nn.Linear(16, 16))
    return net, (torch.randn(4, 6, 16), torch.randn(4, 2, 2, 6, 8))


@case(softmax(6))
def hopfield_iterations():
    def forward(m, x):
        state, stored = m.q(x), m.k(x)
        for _ in range(3):
            state = torch.softmax(0.25 * state @ stored.mT, -1) @ stored
        return m.v(state)

    return Net(forward, q=nn.Linear(16, 16), k=nn.Linear(16, 16), v=nn.Linear(16, 16)), seq()


# ---- attention that is no softmax -----------------------------------------------------------------
@case(THRESHOLD)
def relu_attention():
    return Attention(lambda m, q, k, v: F.relu(q @ k.mT / math.sqrt(8)) / 6 @ v), seq()


@case(THRESHOLD)
def squared_relu_attention():
    return Attention(lambda m, q, k, v: torch.square(F.relu(q @ k.mT / 6 + m.bias)) @ v, bias=torch.randn(6)), seq()


@case(truncation(6))
def relu_attention_normalized():
    def core(m, q, k, v):
        a = F.relu(q @ k.mT)
        return a / (a.sum(-1, keepdim=True) + 1e-6) @ v

    return Attention(core), seq()


@case(TWO_WAY)
def sigmoid_attention():
    return Attention(lambda m, q, k, v: torch.sigmoid(q @ k.mT / math.sqrt(8) - math.log(6)) @ v), seq()


@case(THRESHOLD)
def hard_sigmoid_attention():
    return Attention(lambda m, q, k, v: ((q @ k.mT + 3).clamp(0, 6) / 6) @ v), seq()


@case(kernel(6))
def kernel_attention_by_squared_scores():
    def core(m, q, k, v):
        a = (q @ k.mT) ** 2
        return (a / a.sum(dim=-1, keepdim=True).clamp_min(1e-8)) @ v

    return Attention(core), seq()


@case(softmax(6))
def gaussian_attention_by_distance():
    def core(m, q, k, v):
        d = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1).unsqueeze(-2) - 2 * q @ k.mT
        w = torch.exp(-d / (2 * F.softplus(m.width) ** 2))
        return (w / (w.sum(-1, keepdim=True) + 1e-9)) @ v

    return Attention(core, width=torch.ones(1)), seq()


@case()
def attention_without_normalization():
    return Attention(lambda m, q, k, v: (q @ k.mT / 6) @ v), seq()


@case(truncation(6))
def top_keys_only():
    """Every query keeps its two best keys: exact zeros for the others, by their own scores."""

    def core(m, q, k, v):
        s = q @ k.mT / math.sqrt(8)
        kth = s.topk(2, dim=-1).values[..., -1, None]
        return s.masked_fill(s < kth, float("-inf")).softmax(-1) @ v

    return Attention(core), seq()


@case(softmax(6), TWO_WAY)
def output_gated_by_sigmoid():
    def forward(m, x):
        q, k, v = (heads(f(x)) for f in m.qkv)
        return m.o(merge(F.scaled_dot_product_attention(q, k, v)) * torch.sigmoid(m.g(x)))

    return Net(forward, qkv=linears(3), g=nn.Linear(16, 16), o=nn.Linear(16, 16)), seq()
