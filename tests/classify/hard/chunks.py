"""Attention with sinks, hand-written stabilizers, chunks, windows, hashes and running sums."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    TWO_WAY,
    Attention,
    Net,
    case,
    selection,
    seq,
    softmax,
)


# ---- sinks ----------------------------------------------------------------------------------------
@case(softmax(7))
def sinks_joined_and_dropped():
    def core(m, q, k, v):
        scores = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5
        mask = torch.full((6, 6), torch.finfo(q.dtype).min).triu(1)
        sinks = m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        joined = torch.cat([scores + mask, sinks], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        probs = F.softmax(joined, dim=-1, dtype=joined.dtype)
        return torch.matmul(probs[..., :-1], v)

    return Attention(core, sinks=torch.randn(2)), seq()


@case(softmax(7))
def sinks_in_front_by_einsum():
    def core(m, q, k, v):
        qk = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8)
        qk = torch.cat([m.sinks[None, :, None, None].expand(4, 2, 6, 1), qk], dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(qk, dim=-1)[..., 1:], v)

    return Attention(core, sinks=torch.zeros(2)), seq()


@case(softmax(7))
def sink_key_and_value_as_parameters():
    def core(m, q, k, v):
        k = torch.cat([m.sink_k.expand(4, 2, 1, 8), k], dim=2)
        v = torch.cat([torch.zeros_like(v[:, :, :1]), v], dim=2)
        return F.scaled_dot_product_attention(q, k, v)

    return Attention(core, sink_k=torch.randn(1, 2, 1, 8)), seq()


@case(softmax(7))
def sink_in_the_denominator_stabilized():
    def core(m, q, k, v):
        s = q @ k.mT / math.sqrt(8)
        sink = m.sinks.view(1, 2, 1, 1)
        top = torch.maximum(s.amax(-1, keepdim=True), sink)
        e = torch.exp(s - top)
        return (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(sink - top))

    return Attention(core, sinks=torch.randn(2)), seq()


@case(softmax(6), TWO_WAY, also=[[softmax(7)]])
def sink_as_gate():
    def core(m, q, k, v):
        s = q @ k.mT / math.sqrt(8)
        out = s.softmax(-1) @ v
        lse = torch.logsumexp(s, -1)
        return out * torch.sigmoid(lse - m.sinks[:, None]).unsqueeze(-1)

    return Attention(core, sinks=torch.randn(2)), seq()


@case(softmax(6), softmax(2), also=[[softmax(7)], [softmax(6), TWO_WAY]])
def sink_as_renormalization_by_lse():
    def core(m, q, k, v):
        s = q @ k.mT / math.sqrt(8)
        lse = torch.logsumexp(s, -1, keepdim=True)
        out = torch.exp(s - lse) @ v
        both = torch.cat([lse, m.sinks.view(1, 2, 1, 1).expand_as(lse)], -1)
        return out * torch.exp(lse - torch.logsumexp(both, -1, keepdim=True))

    return Attention(core, sinks=torch.randn(2)), seq()


# ---- stabilizers ----------------------------------------------------------------------------------
@case(softmax(6))
def maximum_subtracted_then_softmax():
    def core(m, q, k, v):
        s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
        s = s - torch.max(s, dim=-1, keepdim=True)[0].detach()
        return torch.matmul(nn.functional.softmax(s, dim=-1), v)

    return Attention(core), seq()


@case(softmax(6))
def stabilized_in_double_and_cast_back():
    def core(m, q, k, v):
        s = (q @ k.mT).to(torch.float64)
        s -= s.amax(dim=-1, keepdim=True).detach()
        p = s.exp()
        p = p / p.sum(dim=-1, keepdim=True)
        return p.type_as(q) @ v

    return Attention(core), seq()


@case(softmax(6))
def softmax_with_constant_shift():
    """The scale goes out and in again so that half precision does not overflow (CogView, GLM)."""

    def core(m, q, k, v):
        s = (q / (8.0 * math.sqrt(8))) @ k.mT
        s = (s - s.amax(-1, keepdim=True)) * 8.0
        return s.softmax(-1) @ v

    return Attention(core), seq()


@case(softmax(9), softmax(6))
def bidirectional_attention_stable_and_clamped():
    """Vision to text and text to vision from one score matrix, guarded for half precision (GLIP, Grounding DINO)."""

    def forward(m, image, text):
        s = m.vision(image) @ m.text(text).transpose(1, 2)
        s = s - s.max()
        s = torch.clamp(s, min=-50000)
        s = torch.clamp(s, max=50000)
        t = s.transpose(1, 2)
        t = t - torch.max(t, dim=-1, keepdim=True)[0]
        t = torch.clamp(torch.clamp(t, min=-50000), max=50000)
        return s.softmax(-1) @ m.tv(text), t.softmax(-1) @ m.vv(image)

    net = Net(forward, vision=nn.Linear(16, 8), text=nn.Linear(16, 8), tv=nn.Linear(16, 8), vv=nn.Linear(16, 8))
    return net, (torch.randn(4, 6, 16), torch.randn(4, 9, 16))


@case(TWO_WAY, softmax(6))
def soft_capped_scores():
    def core(m, q, k, v):
        s = 50.0 * torch.tanh(q @ k.mT / 50.0)
        return s.softmax(-1) @ v

    return Attention(core), seq()


# ---- chunks, windows, hashes ----------------------------------------------------------------------
@case(softmax(4))
def local_attention_by_dots_minus_logsumexp():
    """Chunks of 2 tokens that also see the chunk before (Reformer, one hash)."""

    def core(m, q, k, v):
        def look_back(t):
            return torch.cat([t.roll(1, 2), t], dim=3)

        q, k, v = (t.unflatten(2, (3, 2)) for t in (q, k, v))
        k, v = look_back(k), look_back(v)
        dots = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
        logits = torch.logsumexp(dots, dim=-1, keepdim=True)
        probs = torch.exp(dots - logits)
        return torch.matmul(probs, v).flatten(2, 3)

    return Attention(core), seq()


@case(selection(4), softmax(4))
def hashed_attention():
    """Buckets by the largest rotation, tokens sorted by bucket, attention in chunks of the sorted order."""

    def forward(m, x):
        qk, v = m.qk(x), m.v(x)
        rotated = qk @ m.rotations
        buckets = torch.argmax(torch.cat([rotated, -rotated], dim=-1), dim=-1)
        order = torch.argsort(buckets * 6 + torch.arange(6), dim=-1)
        back = torch.argsort(order, dim=-1)
        sorted_qk = qk.gather(1, order.unsqueeze(-1).expand_as(qk)).unflatten(1, (3, 2))
        sorted_v = v.gather(1, order.unsqueeze(-1).expand_as(v)).unflatten(1, (3, 2))
        keys = F.normalize(sorted_qk, dim=-1)
        keys = torch.cat([keys.roll(1, 1), keys], 2)
        values = torch.cat([sorted_v.roll(1, 1), sorted_v], 2)
        dots = sorted_qk @ keys.mT
        out = torch.exp(dots - dots.logsumexp(-1, keepdim=True)) @ values
        return out.flatten(1, 2).gather(1, back.unsqueeze(-1).expand_as(v))

    net = Net(forward, qk=nn.Linear(16, 8), v=nn.Linear(16, 8))
    net.register_buffer("rotations", torch.randn(8, 2))
    return net, seq()


@case(softmax(3))
def sliding_window_by_padding_and_unfold():
    def core(m, q, k, v):
        k, v = (F.pad(t, (0, 0, 1, 1)).unfold(2, 3, 1) for t in (k, v))
        s = torch.einsum("bhtd,bhtdw->bhtw", q, k) / math.sqrt(8)
        inside = F.pad(torch.ones(6), (1, 1)).unfold(0, 3, 1).bool()
        s = s.masked_fill(~inside, float("-inf"))
        return torch.einsum("bhtw,bhtdw->bhtd", s.softmax(-1), v)

    return Attention(core), seq()


@case(softmax(6))
def neighbourhood_of_three_blocks():
    def core(m, q, k, v):
        def around(t):
            t = F.pad(t.unflatten(2, (3, 2)), (0, 0, 0, 0, 1, 1))
            return torch.cat([t[:, :, :-2], t[:, :, 1:-1], t[:, :, 2:]], dim=3)

        blocks = q.unflatten(2, (3, 2))
        s = torch.einsum("bhnqd,bhnkd->bhnqk", blocks, around(k))
        seen = around(torch.ones(1, 1, 6, 1)).squeeze(-1).unsqueeze(-2) > 0
        p = torch.where(seen, s, torch.finfo(s.dtype).min).softmax(-1)
        return torch.einsum("bhnqk,bhnkd->bhnqd", p, around(v)).flatten(2, 3)

    return Attention(core), seq()


@case(softmax(6))
def blocks_of_queries_concatenated():
    def core(m, q, k, v):
        out = [F.softmax(torch.matmul(part, k.mT) * 8**-0.5, dim=-1) @ v for part in q.split(2, dim=2)]
        return torch.cat(out, dim=2)

    return Attention(core), seq()


@case(softmax(6))
def slices_written_into_a_buffer():
    """Sliced attention: every head of every sample on its own, results assigned into an empty tensor."""

    def core(m, q, k, v):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = torch.zeros_like(q)
        for i in range(0, q.shape[0], 2):
            s = torch.baddbmm(q.new_empty(2, 6, 6), q[i : i + 2], k[i : i + 2].mT, beta=0, alpha=8**-0.5)
            out[i : i + 2] = torch.bmm(s.softmax(-1), v[i : i + 2])
        return out.unflatten(0, (4, 2))

    return Attention(core), seq()


@case(softmax(6))
def flash_attention_by_hand():
    def core(m, q, k, v):
        out = torch.zeros_like(q)
        total = q.new_zeros(4, 2, 6, 1)
        top = q.new_full((4, 2, 6, 1), -math.inf)
        for kb, vb in zip(k.split(2, 2), v.split(2, 2), strict=True):
            s = q @ kb.mT / math.sqrt(8)
            new = torch.maximum(top, s.amax(-1, keepdim=True))
            p = torch.exp(s - new)
            decay = torch.exp(top - new)
            total = decay * total + p.sum(-1, keepdim=True)
            out = decay * out + p @ vb
            top = new
        return out / total

    return Attention(core), seq()


@case(softmax(6), also=[[softmax(3), softmax(2)], [softmax(3), TWO_WAY]])
def flash_attention_of_blocks_merged_by_logsumexp():
    """Ring attention: each block is normalized on its own, blocks are merged by their log-partitions."""

    def core(m, q, k, v):
        out = lse = None
        for kb, vb in zip(k.split(3, 2), v.split(3, 2), strict=True):
            s = q @ kb.mT / math.sqrt(8)
            block_lse = s.logsumexp(-1, keepdim=True)
            block = torch.exp(s - block_lse) @ vb
            if out is None:
                out, lse = block, block_lse
            else:
                new = lse + torch.log(1 + torch.exp(block_lse - lse))
                out = torch.exp(lse - new) * out + torch.exp(block_lse - new) * block
                lse = new
        return out

    return Attention(core), seq()


@case(softmax(6))
def memory_efficient_attention_by_chunk_summaries():
    """Every chunk gives its maximum, weights and values; the global maximum rescales them (Rabe and Staats)."""

    def core(m, q, k, v):
        values, weights, tops = [], [], []
        for kb, vb in zip(k.split(2, 2), v.split(2, 2), strict=True):
            s = q @ kb.mT / math.sqrt(8)
            top = s.amax(-1, keepdim=True).detach()
            e = torch.exp(s - top)
            values.append(e @ vb)
            weights.append(e.sum(-1, keepdim=True))
            tops.append(top)
        values, weights, tops = torch.stack(values), torch.stack(weights), torch.stack(tops)
        scale = torch.exp(tops - tops.amax(0, keepdim=True))
        return (values * scale).sum(0) / (weights * scale).sum(0)

    return Attention(core), seq()


@case(softmax(4))
def shifted_windows():
    """Windows of 2 x 2 on a 4 x 4 map, rolled by one, with the mask that keeps wrapped neighbours apart (Swin)."""

    def forward(m, x):
        b, h, w, c = x.shape

        def windows(t):
            t = t.view(t.shape[0], h // 2, 2, w // 2, 2, -1)
            return t.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, t.shape[-1])

        part = windows(torch.roll(x, (-1, -1), (1, 2)))
        q, k, v = m.qkv(part).chunk(3, -1)
        region = torch.zeros(1, h, w, 1)
        for n, (rows, cols) in enumerate(
            (r, s) for r in (slice(0, 3), slice(3, 4)) for s in (slice(0, 3), slice(3, 4))
        ):
            region[:, rows, cols] = n
        region = windows(region).squeeze(-1)
        mask = (region.unsqueeze(1) - region.unsqueeze(2)).ne(0).float() * -100.0
        s = q @ k.mT * c**-0.5 + m.bias[m.index.view(-1)].view(4, 4)
        s = (s.view(b, -1, 4, 4) + mask).view(-1, 4, 4)
        return m.o(s.softmax(-1) @ v)

    net = Net(forward, qkv=nn.Linear(8, 24), o=nn.Linear(8, 8), bias=torch.randn(9))
    net.register_buffer("index", torch.randint(0, 9, (4, 4)))
    return net, (torch.randn(2, 4, 4, 8),)
