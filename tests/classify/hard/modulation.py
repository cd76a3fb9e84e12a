"""Gates that modulate: adaptive norms, squeeze and excitation, scans; activations in odd places."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    SMOOTH,
    THRESHOLD,
    TWO_WAY,
    Net,
    case,
    heads,
    img,
    linears,
    merge,
    selection,
    seq,
    softmax,
    vec,
)


# ---- modulation -----------------------------------------------------------------------------------
@case(TWO_WAY, TWO_WAY, softmax(6), TWO_WAY)
def diffusion_block_with_adaptive_norm():
    """A time embedding through SiLU, SiLU again before the modulation, attention, the tanh form of GELU."""

    def modulate(x, shift, scale):
        return F.layer_norm(x, (16,)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def forward(m, x, t):
        c = m.t2(F.silu(m.t1(t)))
        s1, k1, g1, s2, k2, g2 = m.ada(F.silu(c)).chunk(6, dim=1)
        h = modulate(x, s1, k1)
        x = x + g1.unsqueeze(1) * m.attn(h, h, h, need_weights=False)[0]
        h = m.down(F.gelu(m.up(modulate(x, s2, k2)), approximate="tanh"))
        return x + g2.unsqueeze(1) * h

    layers = {"t1": nn.Linear(8, 16), "t2": nn.Linear(16, 16), "ada": nn.Linear(16, 96)}
    mlp = {"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}
    return Net(forward, attn=nn.MultiheadAttention(16, 2, batch_first=True), **layers, **mlp), (
        *seq(),
        torch.randn(4, 8),
    )


@case(TWO_WAY)
def one_condition_gated_for_two_blocks():
    """The same values through the same gate twice: one layer, one row."""

    def forward(m, x, t):
        c = m.embed(t)
        return m.a(F.silu(c)) * x + m.b(F.silu(c))

    return Net(forward, embed=nn.Linear(8, 16), a=nn.Linear(16, 16), b=nn.Linear(16, 16)), (*vec(), torch.randn(64, 8))


@case(THRESHOLD, THRESHOLD)
def preactivation_block():
    def forward(m, x):
        h = m.stem(x)
        h = h + m.c2(F.relu(m.n2(m.c1(F.relu(m.n1(h))))))
        return h.mean((2, 3))

    convs = {
        "stem": nn.Conv2d(3, 8, 3, padding=1),
        "c1": nn.Conv2d(8, 8, 3, padding=1),
        "c2": nn.Conv2d(8, 8, 3, padding=1),
    }
    return Net(forward, n1=nn.BatchNorm2d(8), n2=nn.BatchNorm2d(8), **convs), img()


@case()
def gates_of_the_raw_input():
    """Nothing that is learned reaches these operators."""

    def forward(m, x):
        x = torch.cat([F.relu(x), torch.sigmoid(x), F.softmax(x, -1), x.clamp(-1, 1)], -1)
        return m.fc(x)

    return Net(forward, fc=nn.Linear(64, 8)), vec()


@case(THRESHOLD)
def weights_passed_by_functional_call():
    def forward(m, x):
        weights = {name: p * 0.9 for name, p in m.net.named_parameters()}
        return torch.func.functional_call(m.net, weights, (x,))

    return Net(forward, net=nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))), vec()


@case(TWO_WAY, softmax(4))
def modules_made_during_forward():
    def forward(m, x):
        h = nn.Tanh()(m.a(x))
        return nn.Softmax(dim=-1)(m.b(h))

    return Net(forward, a=nn.Linear(16, 12), b=nn.Linear(12, 4)), vec()


@case(THRESHOLD, TWO_WAY, SMOOTH)
def same_slot_with_three_activations():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.act = linears(3), None

        def forward(self, x):
            for layer, act in zip(self.layers, (F.relu, F.silu, F.gelu), strict=True):
                self.act = act
                x = self.act(layer(x))
            self.act = None
            return x

    return M(), vec()


# ---- squeeze and excitation, scans ----------------------------------------------------------------
@case(THRESHOLD, softmax(16), TWO_WAY)
def context_gates_from_softmax_pooling():
    def forward(m, x):
        x = m.conv(x)
        a = m.score(x).flatten(2).softmax(-1)
        c = torch.einsum("bcn,bkn->bc", x.flatten(2), a)
        return x * torch.sigmoid(m.up(F.relu(m.down(c))))[:, :, None, None]

    layers = {"conv": nn.Conv2d(3, 8, 1), "score": nn.Conv2d(8, 1, 1), "down": nn.Linear(8, 2), "up": nn.Linear(2, 8)}
    return Net(forward, **layers), img(s=4)


@case(TWO_WAY, TWO_WAY)
def short_convolution_with_two_gates():
    """Depthwise causal convolution after SiLU, its output gated by another SiLU projection."""

    def forward(m, x):
        u = F.silu(F.conv1d(F.pad(m.u(x).mT, (3, 0)), m.taps, groups=16)).mT
        return m.o(u * F.silu(m.z(x)))

    return Net(
        forward, u=nn.Linear(16, 16), z=nn.Linear(16, 16), o=nn.Linear(16, 16), taps=torch.randn(16, 1, 4)
    ), seq()


@case(TWO_WAY, TWO_WAY)
def real_gated_linear_recurrence():
    """RG-LRU: recurrence and input gates by sigmoids, a learned decay to the power of the gate."""

    def forward(m, x):
        r, i = torch.sigmoid(m.r(x)), torch.sigmoid(m.i(x))
        log_a = -8.0 * r * F.softplus(m.a)
        a = torch.exp(log_a)
        gated = x * i * torch.sqrt((1 - torch.exp(2 * log_a)).clamp(min=1e-6))
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + gated[:, t]
            out.append(h)
        return torch.stack(out, 1)

    return Net(forward, r=nn.Linear(16, 16), i=nn.Linear(16, 16), a=torch.randn(16)), seq()


@case(TWO_WAY)
def bounded_coupling_layer():
    def forward(m, x):
        a, b = x.chunk(2, -1)
        shift, log_scale = m.net(a).chunk(2, -1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([a, b * torch.exp(log_scale) + shift], -1), log_scale.sum(-1)

    return Net(forward, net=nn.Linear(8, 16)), vec()


@case(selection(None), softmax(3))
def maximum_of_a_bag_of_embeddings():
    def forward(m, ids):
        return m.fc(m.bag(ids)).log_softmax(-1)

    return Net(forward, bag=nn.EmbeddingBag(20, 8, mode="max"), fc=nn.Linear(8, 3)), (torch.randint(0, 20, (6, 5)),)


@case(selection(6))
def order_statistics_over_tokens():
    """The largest by a sort along the tokens."""

    def forward(m, x):
        return torch.sort(m.fc(x), dim=1, descending=True)[0][:, 0]

    return Net(forward, fc=nn.Linear(16, 8)), seq()


@case(TWO_WAY, softmax(6))
def heads_gated_before_softmax_pooling():
    def forward(m, x):
        q, k, v = (heads(f(x)) for f in m.qkv)
        gate = torch.sigmoid(m.g(x)).mT.unsqueeze(-1)
        return merge(gate * ((q @ k.mT) / math.sqrt(8)).softmax(-1) @ v)

    return Net(forward, qkv=linears(3), g=nn.Linear(16, 2)), seq()
