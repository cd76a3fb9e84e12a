"""Activations and gated units in the spellings of real code."""

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
    img,
    seq,
    vec,
)


# ---- activations by hand --------------------------------------------------------------------------
class Activated(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, fn):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.fn = fn

    def forward(self, x):
        return self.down(self.fn(self.up(x)))


def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_bloom(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def gelu_python(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_by_erfc(x):
    return 0.5 * x * torch.erfc(-x * 2**-0.5)


def gelu_by_normal_cdf(x):
    return x * torch.special.ndtr(x)


def laplace_gate(x):
    """The activation of Mega: a shifted and scaled normal distribution function."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107).div(0.282095 * math.sqrt(2.0))))


def quick_gelu_by_hand(x):
    return x / (1 + torch.exp(-1.702 * x))


def swish_by_expit(x):
    return x * torch.special.expit(x)


def swish_by_tanh(x):
    return 0.5 * x * (1 + torch.tanh(0.5 * x))


def mish_algebraic(x):
    """tanh(softplus(x)) written without tanh, log or overflow for moderate x."""
    e = torch.exp(x)
    n = e * e + 2 * e
    return x * n / (n + 2)


def lecun_tanh(x):
    return 1.7159 * torch.tanh(x * (2.0 / 3.0))


def tanh_by_expm1(x):
    e = torch.expm1(2 * x)
    return e / (e + 2)


def softplus_shifted(x):
    """SchNet's shifted softplus."""
    return F.softplus(x) - math.log(2.0)


def sigmoid_stable_by_where(x):
    e = torch.exp(-x.abs())
    return torch.where(x >= 0, 1 / (1 + e), e / (1 + e))


def log_cosh(x):
    """ln cosh is the log-partition of a sign: x + softplus(-2x) - ln 2."""
    return x + F.softplus(-2.0 * x) - math.log(2.0)


def relu_squared_of_primer(x):
    return torch.square(torch.relu(x))


def star_relu(x):
    return 0.8944 * F.relu(x) ** 2 - 0.4472


def hard_swish_of_mobilenet(x):
    return x * F.hardtanh(x + 3, 0.0, 6.0) / 6.0


def hard_sigmoid_by_clip(x):
    return torch.clip(0.2 * x + 0.5, 0, 1)


def leaky_by_two_relus(x):
    return F.relu(x) - 0.1 * F.relu(-x)


def concatenated_relu(x):
    a, b = x.chunk(2, -1)
    return torch.cat([F.relu(torch.cat([a, -a], -1))], -1) + torch.cat([b, -b], -1)


def in_place_clamp(x):
    return x.clone().clamp_min_(0)


def relu_by_lt_mask(x):
    return torch.where(x.lt(0), torch.zeros((), dtype=x.dtype), x)


for _fn, _row in (
    (gelu_new, TWO_WAY),
    (gelu_fast, TWO_WAY),
    (gelu_bloom, TWO_WAY),
    (quick_gelu_by_hand, TWO_WAY),
    (swish_by_expit, TWO_WAY),
    (swish_by_tanh, TWO_WAY),
    (mish_algebraic, TWO_WAY),
    (lecun_tanh, TWO_WAY),
    (tanh_by_expm1, TWO_WAY),
    (softplus_shifted, TWO_WAY),
    (sigmoid_stable_by_where, TWO_WAY),
    (log_cosh, TWO_WAY),
    (gelu_python, SMOOTH),
    (gelu_by_erfc, SMOOTH),
    (gelu_by_normal_cdf, SMOOTH),
    (laplace_gate, SMOOTH),
    (relu_squared_of_primer, THRESHOLD),
    (star_relu, THRESHOLD),
    (hard_swish_of_mobilenet, THRESHOLD),
    (hard_sigmoid_by_clip, THRESHOLD),
    (leaky_by_two_relus, THRESHOLD),
    (concatenated_relu, THRESHOLD),
    (in_place_clamp, THRESHOLD),
    (relu_by_lt_mask, THRESHOLD),
):

    def _build(fn=_fn):
        return Activated(fn), vec()

    _build.__name__ = f"act_{_fn.__name__}"
    case(_row)(_build)


# ---- gated units ----------------------------------------------------------------------------------
@case(SMOOTH)
def geglu_from_one_projection():
    def forward(m, x):
        a, gate = m.proj(x).chunk(2, dim=-1)
        return m.out(a * F.gelu(gate))

    return Net(forward, proj=nn.Linear(16, 64), out=nn.Linear(32, 16)), seq()


@case(TWO_WAY)
def swiglu_of_a_fused_projection():
    def forward(m, x):
        gate_up = m.gate_up(x)
        gate, up = gate_up[..., :24], gate_up[..., 24:]
        return m.down(up * (gate * torch.sigmoid(gate)))

    return Net(forward, gate_up=nn.Linear(16, 48), down=nn.Linear(24, 16)), seq()


@case(TWO_WAY)
def convolutional_glu():
    def forward(m, x):
        return m.point2(F.glu(m.point1(x.transpose(1, 2)), dim=1)).transpose(1, 2)

    return Net(forward, point1=nn.Conv1d(16, 32, 1), point2=nn.Conv1d(16, 16, 1)), seq()


@case(THRESHOLD, TWO_WAY)
def highway():
    def forward(m, x):
        t = torch.sigmoid(m.transform(x))
        return F.relu(m.plain(x)) * t + x * (1.0 - t)

    return Net(forward, plain=nn.Linear(16, 16), transform=nn.Linear(16, 16)), vec()


@case(THRESHOLD, TWO_WAY)
def squeeze_excitation_with_linears():
    def forward(m, x):
        x = m.bn(m.conv(x))
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = m.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)

    fc = nn.Sequential(nn.Linear(8, 2, bias=False), nn.ReLU(inplace=True), nn.Linear(2, 8, bias=False), nn.Sigmoid())
    return Net(forward, conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), fc=fc), img()


@case(THRESHOLD, THRESHOLD, THRESHOLD)
def squeeze_excitation_of_mobilenet():
    """ReLU inside, a hard sigmoid as the gate, hardswish around it."""

    def forward(m, x):
        x = F.hardswish(m.conv(x))
        s = F.relu(m.reduce(F.adaptive_avg_pool2d(x, 1)))
        return F.hardsigmoid(m.expand(s), inplace=True) * x

    return Net(forward, conv=nn.Conv2d(3, 8, 3), reduce=nn.Conv2d(8, 2, 1), expand=nn.Conv2d(2, 8, 1)), img()


@case(TWO_WAY, TWO_WAY, TWO_WAY)
def squeeze_excitation_of_efficientnet():
    def forward(m, x):
        x = F.silu(m.depth(x))
        s = x.mean((2, 3), keepdim=True)
        return x * m.expand(F.silu(m.reduce(s))).sigmoid()

    return Net(forward, depth=nn.Conv2d(8, 8, 3, groups=8), reduce=nn.Conv2d(8, 2, 1), expand=nn.Conv2d(2, 8, 1)), img(
        c=8
    )


@case(TWO_WAY)
def efficient_channel_attention():
    def forward(m, x):
        y = F.adaptive_avg_pool2d(m.stem(x), 1)
        y = m.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return m.stem(x) * torch.sigmoid(y)

    return Net(forward, stem=nn.Conv2d(3, 8, 1), conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)), img()


@case(TWO_WAY)
def film_with_a_sigmoid_scale():
    def forward(m, x, condition):
        return torch.sigmoid(m.gamma(condition)) * m.body(x) + m.beta(condition)

    return Net(forward, gamma=nn.Linear(4, 8), beta=nn.Linear(4, 8), body=nn.Linear(16, 8)), (
        *vec(),
        torch.randn(64, 4),
    )


@case()
def film():
    def forward(m, x, condition):
        gamma, beta = m.film(condition).chunk(2, -1)
        return m.body(x) * (1 + gamma) + beta

    return Net(forward, film=nn.Linear(4, 16), body=nn.Linear(16, 8)), (*vec(), torch.randn(64, 4))


@case(TWO_WAY)
def hypernetwork():
    """A small tanh network writes the weights of the main layer, sample by sample."""

    def forward(m, x, task):
        w = m.write(torch.tanh(m.read(task))).view(-1, 8, 16)
        return torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)

    return Net(forward, read=nn.Linear(4, 12), write=nn.Linear(12, 128)), (*vec(), torch.randn(64, 4))
