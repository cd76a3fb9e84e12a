"""Numerators over running denominators, linear attention, scans."""

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
)


# ---- numerator over running denominator -----------------------------------------------------------
@case(softmax(None), TWO_WAY)
def wkv_loop():
    """RWKV 4 with its running maximum: exponential weights of the past over their sum, behind a sigmoid gate."""

    def forward(m, x):
        back = F.pad(x, (0, 0, 1, -1))
        k = m.key(x * m.mix + back * (1 - m.mix))
        v = m.value(x)
        r = torch.sigmoid(m.receptance(x))
        decay = -torch.exp(m.decay)
        num = den = torch.zeros_like(k[:, 0])
        top = torch.zeros_like(num) - 1e38
        out = torch.zeros_like(k)
        for t in range(k.shape[1]):
            kt, vt = k[:, t].float(), v[:, t]
            new = torch.maximum(top, kt + m.first)
            e1, e2 = torch.exp(top - new), torch.exp(kt + m.first - new)
            out[:, t] = ((e1 * num + e2 * vt) / (e1 * den + e2)).to(x.dtype)
            new = torch.maximum(top + decay, kt)
            e1, e2 = torch.exp(top + decay - new), torch.exp(kt - new)
            num, den, top = e1 * num + e2 * vt, e1 * den + e2, new
        return m.output(r * out)

    layers = {n: nn.Linear(16, 16, bias=False) for n in ("key", "value", "receptance", "output")}
    return Net(forward, mix=torch.rand(16), decay=torch.randn(16), first=torch.randn(16), **layers), seq()


@case(softmax(None), TWO_WAY)
def wkv_without_stabilizer():
    def forward(m, x):
        k, v, r = m.key(x).clamp(max=60).exp(), m.value(x), m.receptance(x).sigmoid()
        w = torch.exp(-torch.exp(m.decay))
        a = b = torch.zeros_like(k[:, 0])
        out = []
        for kt, vt in zip(k.unbind(1), v.unbind(1), strict=True):
            boosted = torch.exp(m.first) * kt
            out.append((a + boosted * vt) / (b + boosted))
            a, b = w * a + kt * vt, w * b + kt
        return m.output(r * torch.stack(out, 1))

    layers = {n: nn.Linear(16, 16, bias=False) for n in ("key", "value", "receptance", "output")}
    return Net(forward, decay=torch.randn(16), first=torch.randn(16), **layers), seq()


@case(THRESHOLD, TWO_WAY)
def channel_mix():
    def forward(m, x):
        k = torch.square(torch.relu(m.key(x)))
        return torch.sigmoid(m.receptance(x)) * m.value(k)

    return Net(forward, key=nn.Linear(16, 32), value=nn.Linear(32, 16), receptance=nn.Linear(16, 16)), seq()


@case(softmax(None), TWO_WAY, TWO_WAY, TWO_WAY)
def exponential_gating_with_normalizer():
    """sLSTM without recurrence in its gates: exponential input gate, cell over normalizer state, stabilized."""

    def forward(m, x):
        i, f, z, o = m.i(x), F.logsigmoid(m.f(x)), torch.tanh(m.z(x)), torch.sigmoid(m.o(x))
        c = n = torch.zeros_like(i[:, 0])
        top = torch.full_like(c, -1e30)
        out = []
        for t in range(x.shape[1]):
            new = torch.maximum(f[:, t] + top, i[:, t])
            keep, write = torch.exp(f[:, t] + top - new), torch.exp(i[:, t] - new)
            c, n, top = keep * c + write * z[:, t], keep * n + write, new
            out.append(o[:, t] * c / n)
        return torch.stack(out, 1)

    return Net(forward, i=nn.Linear(16, 8), f=nn.Linear(16, 8), z=nn.Linear(16, 8), o=nn.Linear(16, 8)), seq()


@case(
    TWO_WAY,
    TWO_WAY,
    also=[[softmax(None), TWO_WAY, TWO_WAY], [("em", "kernel", None), TWO_WAY, TWO_WAY]],
)
def matrix_memory_in_parallel():
    """mLSTM: signed weights over max(|sum|, 1), so nothing sums to one; the gates are the competitions."""

    def forward(m, x):
        q, k, v = (heads(f(x)) for f in m.qkv)
        i, f = m.i(x).mT.unsqueeze(-2), F.logsigmoid(m.f(x)).mT
        past = torch.cumsum(f, -1)
        d = past.unsqueeze(-1) - past.unsqueeze(-2) + i
        d = d.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        top = d.max(-1, keepdim=True).values
        c = q @ (k / math.sqrt(8)).mT * torch.exp(d - top)
        n = torch.maximum(c.sum(-1, keepdim=True).abs(), torch.exp(-top))
        return merge(c / (n + 1e-6) @ v) * torch.sigmoid(m.o(x))

    parts = {"i": nn.Linear(16, 2), "f": nn.Linear(16, 2), "o": nn.Linear(16, 16)}
    return Net(forward, qkv=linears(3), **parts), seq()


@case(softmax(6), TWO_WAY)
def attention_free_transformer():
    """AFT-full: pairwise position biases times exponential keys, the ratio behind a sigmoid of the query."""

    def forward(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        w = torch.exp(m.w).unsqueeze(0)
        num = w @ (torch.exp(k) * v)
        den = w @ torch.exp(k)
        return m.o(torch.sigmoid(q) * num / den)

    parts = {n: nn.Linear(16, 16) for n in "qkvo"}
    return Net(forward, w=torch.randn(6, 6) * 0.1, **parts), seq()


@case(softmax(6), TWO_WAY)
def attention_free_transformer_simple():
    def forward(m, x):
        return torch.sigmoid(m.q(x)) * (m.k(x).softmax(dim=1) * m.v(x)).sum(dim=1, keepdim=True)

    return Net(forward, **{n: nn.Linear(16, 16) for n in "qkv"}), seq()


@case(softmax(6))
def running_average_by_cumulated_exponentials():
    def forward(m, x):
        e = torch.exp(m.k(x) - m.k(x).amax(1, keepdim=True))
        return torch.cumsum(e * m.v(x), 1) / torch.cumsum(e, 1)

    return Net(forward, k=nn.Linear(16, 16), v=nn.Linear(16, 16)), seq()


# ---- linear attention -----------------------------------------------------------------------------
# The feature map computes what the kernel is made of, so its gates may be rows of their own, or absorbed.
FEATURES = [[kernel(6)], [kernel(6), THRESHOLD]]


@case(kernel(6), THRESHOLD, THRESHOLD, also=FEATURES)
def linear_attention_of_elu_features():
    def core(m, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (torch.einsum("bhld,bhd->bhl", q, k.sum(dim=2)) + 1e-6)
        return torch.einsum("bhld,bhdm,bhl->bhlm", q, torch.einsum("bhsd,bhsm->bhdm", k, v), z)

    return Attention(core), seq()


@case(kernel(6), THRESHOLD, THRESHOLD, also=FEATURES)
def linear_attention_causal_by_cumsum():
    def core(m, q, k, v):
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        kv = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=2)
        den = (q * torch.cumsum(k, dim=2)).sum(-1, keepdim=True).clamp(min=1e-6)
        return (q.unsqueeze(-2) @ kv).squeeze(-2) / den

    return Attention(core), seq()


@case(kernel(None), THRESHOLD, THRESHOLD, also=[[kernel(None)], [kernel(None), THRESHOLD]])
def linear_attention_as_a_recurrence():
    def core(m, q, k, v):
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        s, z, out = q.new_zeros(4, 2, 8, 8), q.new_zeros(4, 2, 8), []
        for t in range(6):
            s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
            z = z + k[:, :, t]
            num = torch.einsum("bhd,bhdm->bhm", q[:, :, t], s)
            out.append(num / (torch.einsum("bhd,bhd->bh", q[:, :, t], z)[..., None] + 1e-6))
        return torch.stack(out, 2)

    return Attention(core), seq()


@case(kernel(6), TWO_WAY, TWO_WAY, also=[[kernel(6)], [kernel(6), TWO_WAY]])
def linear_attention_of_sigmoid_features():
    """Flow-attention's first step: sigmoid features, keys summed, everything positive."""

    def core(m, q, k, v):
        q, k = torch.sigmoid(q), torch.sigmoid(k)
        return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT + 1e-6)

    return Attention(core), seq()


@case(softmax(6), also=[[kernel(6)]])
def random_features_of_the_softmax_kernel():
    """Performer: positive random features, exp(wx - |x|^2 / 2), normalized by the sum over keys."""

    def core(m, q, k, v):
        def features(t, over):
            t = t * 8**-0.25
            shift = t.pow(2).sum(-1, keepdim=True) / 2
            u = t @ m.projection.mT
            return 4**-0.5 * (torch.exp(u - shift - u.amax(dim=over, keepdim=True).detach()) + 1e-4)

        q, k = features(q, -1), features(k, (-1, -2))
        inverse = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2))
        return torch.einsum("...de,...nd,...n->...ne", torch.einsum("...nd,...ne->...de", k, v), q, inverse)

    net = Attention(core)
    net.register_buffer("projection", torch.randn(4, 8))
    return net, seq()


@case(softmax(8), softmax(6))
def efficient_attention_of_softmax_features():
    """Queries normalized over features, keys over positions; the product needs no denominator."""

    def core(m, q, k, v):
        return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)

    return Attention(core), seq()


@case(TWO_WAY, TWO_WAY)
def gated_linear_attention():
    """Decays are exp(logsigmoid / 16), nothing is normalized; a swish gate closes it."""

    def forward(m, x):
        q, k, v = (heads(f(x)) for f in m.qkv)
        decay = torch.exp(F.logsigmoid(heads(m.decay(x))) / 16)
        s, out = q.new_zeros(4, 2, 8, 8), []
        for t in range(6):
            s = s * decay[:, :, t, :, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, :, None] * s).sum(-2))
        o = merge(torch.stack(out, 2))
        o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-5)
        return m.o(o * F.silu(m.g(x)))

    return Net(forward, qkv=linears(3), **{n: nn.Linear(16, 16) for n in ("decay", "g", "o")}), seq()


@case()
def retention():
    """Signed weights over their absolute sum: normalization, but no responsibilities."""

    def core(m, q, k, v):
        steps = torch.arange(6.0)
        decay = torch.exp((steps[:, None] - steps) * math.log(0.9)).tril()
        s = q @ k.mT * decay
        s = s / s.detach().abs().sum(-1, keepdim=True).clamp(min=1)
        return F.group_norm((s @ v).flatten(0, 1).transpose(1, 2), 2).transpose(1, 2).unflatten(0, (4, 2))

    return Attention(core), seq()


# ---- recurrent and state-space --------------------------------------------------------------------
@case(TWO_WAY, TWO_WAY, TWO_WAY)
def selective_scan():
    """Mamba: SiLU after the depthwise convolution, softplus steps, a scan, a SiLU gate."""

    def forward(m, x):
        x, z = m.in_proj(x).chunk(2, dim=-1)
        u = F.silu(m.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, b, c = m.x_proj(u).split([2, 4, 4], dim=-1)
        dt = F.softplus(m.dt_proj(dt))
        a = -torch.exp(m.a_log)
        da = torch.exp(dt.unsqueeze(-1) * a)
        dbu = dt.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
        h, ys = torch.zeros_like(da[:, 0]), []
        for t in range(x.shape[1]):
            h = da[:, t] * h + dbu[:, t]
            ys.append((h * c[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(ys, 1) + u * m.d
        return m.out_proj(y * F.silu(z))

    layers = {"in_proj": nn.Linear(16, 48), "x_proj": nn.Linear(24, 10), "dt_proj": nn.Linear(2, 24)}
    conv, out = nn.Conv1d(24, 24, 4, groups=24, padding=3), nn.Linear(24, 16)
    return Net(forward, conv1d=conv, out_proj=out, a_log=torch.rand(24, 4), d=torch.ones(24), **layers), seq()


@case()
def diagonal_state_space_without_gates():
    def forward(m, x):
        a = -torch.exp(m.log_a)
        step = torch.exp(m.log_dt)
        kernel_ = (m.c * torch.exp(step * a).unsqueeze(-1) ** torch.arange(6)).sum(0)
        y = torch.fft.irfft(torch.fft.rfft(m.u(x), 12, 1) * torch.fft.rfft(kernel_, 12).view(1, -1, 1), 12, 1)[:, :6]
        return m.o(y)

    parts = {"log_a": torch.randn(4), "log_dt": torch.randn(4), "c": torch.randn(4, 1)}
    return Net(forward, u=nn.Linear(16, 8), o=nn.Linear(8, 8), **parts), seq()


@case(TWO_WAY)
def minimal_gated_unit():
    def forward(m, x):
        z, candidate = torch.sigmoid(m.z(x)), m.h(x)
        h, out = torch.zeros_like(candidate[:, 0]), []
        for t in range(x.shape[1]):
            h = (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
            out.append(h)
        return torch.stack(out, 1)

    return Net(forward, z=nn.Linear(16, 8), h=nn.Linear(16, 8)), seq()


@case(TWO_WAY)
def elman_network_unrolled():
    def forward(m, x):
        h = x.new_zeros(x.shape[0], 12)
        for t in range(x.shape[1]):
            h = torch.tanh(m.cell(torch.cat([x[:, t], h], -1)))
        return h

    return Net(forward, cell=nn.Linear(28, 12)), seq()
