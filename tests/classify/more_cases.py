"""Networks whose verdicts follow from the theory: spellings, dimensions and look-alikes beyond the basic ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

CASES: dict[str, tuple] = {}


def case(*expected, objective=None):
    def register(builder):
        assert builder.__name__ not in CASES
        CASES[builder.__name__] = (builder, list(expected), objective)
        return builder

    return register


class Fn(nn.Module):
    def __init__(self, fn, width=12, **parameters):
        super().__init__()
        self.fc = nn.Linear(16, width)
        self.fn = fn
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        z = self.fc(x)
        return self.fn(z, self) if self.fn.__code__.co_argcount == 2 else self.fn(z)


def vec(n=64):
    return (torch.randn(n, 16),)


def seq(n=4, t=6):
    return (torch.randn(n, t, 16),)


def img(n=4, c=3, s=16):
    return (torch.randn(n, c, s, s),)


SOFTMAX12, KERNEL12 = ("em", "softmax", 12), ("em", "kernel", 12)
TWO_WAY, THRESHOLD, SMOOTH = ("em", "logistic", 2), ("hard", "threshold", 2), ("soft", "smooth-gate", 2)


# ---- gates in other words -----------------------------------------------------------------------
def gate(expected, fn, **parameters):
    def build():
        return Fn(fn, **{k: v.clone() for k, v in parameters.items()}), vec()

    return expected, build


def inplace_mask(z):
    z = z.clone()
    z[z < 0] = 0
    return z


GATES = {
    "relu6": gate(THRESHOLD, lambda z: F.relu6(z)),
    "hardtanh": gate(THRESHOLD, lambda z: F.hardtanh(z)),
    "hardsigmoid": gate(THRESHOLD, lambda z: F.hardsigmoid(z)),
    "hardswish_by_hand": gate(THRESHOLD, lambda z: z * F.relu6(z + 3) / 6),
    "hardshrink": gate(THRESHOLD, lambda z: F.hardshrink(z)),
    "softshrink": gate(THRESHOLD, lambda z: F.softshrink(z)),
    "threshold_op": gate(THRESHOLD, lambda z: F.threshold(z, 0.1, 0.0)),
    "celu": gate(THRESHOLD, lambda z: F.celu(z, 0.7)),
    "selu": gate(THRESHOLD, lambda z: F.selu(z)),
    "prelu": gate(THRESHOLD, lambda z, m: F.prelu(z, m.a), a=torch.full((12,), 0.2)),
    "prelu_by_hand": gate(THRESHOLD, lambda z, m: z.clamp(min=0) + m.a * z.clamp(max=0), a=torch.rand(12)),
    "leaky_by_maximum": gate(THRESHOLD, lambda z: torch.maximum(z, 0.1 * z)),
    "relu_by_abs": gate(THRESHOLD, lambda z: (z + z.abs()) / 2),
    "relu_by_maximum": gate(THRESHOLD, lambda z: torch.maximum(z, torch.zeros_like(z))),
    "relu_by_index": gate(THRESHOLD, inplace_mask),
    "relu_by_masked_fill": gate(THRESHOLD, lambda z: z.masked_fill(z < 0, 0.0)),
    "relu_by_heaviside": gate(THRESHOLD, lambda z: z * torch.heaviside(z, torch.zeros(()))),
    "relu_by_sign": gate(THRESHOLD, lambda z: z * (z.sign() + 1) / 2),
    "clip": gate(THRESHOLD, lambda z: z.clip(-0.5, 0.5)),
    "jump_relu": gate(THRESHOLD, lambda z, m: z * (z > m.log_t.exp()), log_t=torch.randn(12) - 2),
    "binary_step": gate(THRESHOLD, lambda z: (z > 0).float()),
    "sign": gate(THRESHOLD, lambda z: torch.sign(z)),
    "elu_by_where": gate(THRESHOLD, lambda z: torch.where(z > 0, z, torch.expm1(z))),
    "relu_times_sigmoid": gate(THRESHOLD, lambda z: F.relu(z) * torch.sigmoid(z)),
    "sigmoid_by_hand": gate(TWO_WAY, lambda z: 1 / (1 + torch.exp(-z))),
    "sigmoid_base_two": gate(TWO_WAY, lambda z: 1 / (1 + 2.0 ** (-z))),
    "tanh_by_hand": gate(TWO_WAY, lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())),
    "tanh_from_sigmoid": gate(TWO_WAY, lambda z: 2 * torch.sigmoid(2 * z) - 1),
    "softplus_by_hand": gate(TWO_WAY, lambda z: torch.log1p(z.exp())),
    "softplus_stable": gate(TWO_WAY, lambda z: z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))),
    "softplus_logaddexp": gate(TWO_WAY, lambda z: torch.logaddexp(z, torch.zeros_like(z))),
    "logsigmoid": gate(TWO_WAY, lambda z: F.logsigmoid(z)),
    "mish": gate(TWO_WAY, lambda z: F.mish(z)),
    "mish_by_hand": gate(TWO_WAY, lambda z: z * torch.tanh(F.softplus(z))),
    "swish_learned": gate(TWO_WAY, lambda z, m: z * torch.sigmoid(m.b * z), b=torch.rand(12) + 0.5),
    "swish_by_hand": gate(TWO_WAY, lambda z: z / (1 + torch.exp(-z))),
    "gelu_tanh_by_hand": gate(
        TWO_WAY, lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "scaled_tanh": gate(TWO_WAY, lambda z: 1.7159 * torch.tanh(2 / 3 * z)),
    "soft_cap": gate(TWO_WAY, lambda z: 30 * torch.tanh(z / 30)),
    "sigmoid_clamped_for_log": gate(TWO_WAY, lambda z: torch.log(torch.sigmoid(z).clamp(min=1e-6))),
    "tanhshrink": gate(TWO_WAY, lambda z: F.tanhshrink(z)),
    "gelu_erf_by_hand": gate(SMOOTH, lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))),
    "algebraic_sigmoid": gate(SMOOTH, lambda z: z / torch.sqrt(1 + z * z)),
    "arctan": gate(SMOOTH, lambda z: torch.atan(z)),
    "erf": gate(SMOOTH, lambda z: torch.erf(z)),
    "softsign_by_hand": gate(SMOOTH, lambda z: z / (1 + z.abs())),
    "absolute_value": gate(None, lambda z: z.abs()),
    "square": gate(None, lambda z: z * z),
    "sine": gate(None, lambda z: torch.sin(30 * z)),
    "snake": gate(None, lambda z: z + torch.sin(z) ** 2),
    "guarded_log": gate(None, lambda z: torch.log(z.abs().clamp(min=1e-6))),
    "guarded_root": gate(None, lambda z: (z * z).clamp(min=1e-12).sqrt()),
    "half_range_guard": gate(None, lambda z: z.clamp(-65504.0, 65504.0)),
    "symlog": gate(None, lambda z: torch.sign(z) * torch.log1p(z.abs())),
    "gaussian_bump": gate(None, lambda z: torch.exp(-z * z)),
    "cosine": gate(None, lambda z: torch.cos(z)),
    "affine_chain": gate(None, lambda z, m: z * m.g + 1, g=torch.rand(12)),
}
for _name, (_expected, _build) in GATES.items():
    _build.__name__ = _name
    case(*([_expected] if _expected else []))(_build)


@case(THRESHOLD)
def relu_behind_batch_norm_3d():
    return nn.Sequential(nn.Conv1d(16, 8, 1), nn.BatchNorm1d(8), nn.ReLU()), (torch.randn(4, 16, 6),)


@case(TWO_WAY)
def swiglu():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.u, self.d = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            return self.d(F.silu(self.g(x)) * self.u(x))

    return M(), seq()


@case(THRESHOLD)
def reglu_by_hand():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Linear(16, 48)

        def forward(self, x):
            a, b = self.g(x).chunk(2, -1)
            return a * F.relu(b)

    return M(), seq()


@case(TWO_WAY)
def glu_by_hand():
    def f(z):
        a, b = z.chunk(2, -1)
        return a * torch.sigmoid(b)

    return Fn(f), vec()


@case(TWO_WAY, TWO_WAY)
def two_convolutions_gated():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Conv1d(16, 8, 1), nn.Conv1d(16, 8, 1)

        def forward(self, x):
            return torch.tanh(self.f(x)) * torch.sigmoid(self.g(x))

    return M(), (torch.randn(4, 16, 6),)


@case(TWO_WAY)
def gru():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(16, 12, num_layers=2, bidirectional=True)

        def forward(self, x):
            return self.rnn(x)[0]

    return M(), (torch.randn(5, 8, 16),)


@case(TWO_WAY)
def lstm_cell_unrolled():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(16, 12)

        def forward(self, x):
            h = c = x.new_zeros(x.shape[0], 12)
            for t in range(x.shape[1]):
                h, c = self.cell(x[:, t], (h, c))
            return h

    return M(), seq()


@case(THRESHOLD)
def one_layer_in_a_loop():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            for _ in range(3):
                x = F.relu(self.fc(x))
            return x

    return M(), vec()


@case(THRESHOLD, THRESHOLD)
def residual_block():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return F.relu(self.b(F.relu(self.a(x))) + x)

    return M(), img()


@case(TWO_WAY, THRESHOLD)
def squeeze_and_excitation():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

        def forward(self, x):
            x = self.c(x)
            return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))

    return M(), img()


# ---- softmax in other words ---------------------------------------------------------------------
def _exp_minus_lse(z):
    return torch.exp(z - torch.logsumexp(z, -1, keepdim=True))


def _hand_lse(z):
    m = z.amax(-1, keepdim=True)
    return m + torch.log(torch.exp(z - m).sum(-1, keepdim=True))


def _base_two(z):
    p = torch.exp2(z)
    return p * p.sum(-1, keepdim=True).reciprocal()


def _power(z):
    p = torch.pow(3.0, z)
    return F.normalize(p, p=1, dim=-1)


for _name, _fn in {
    "exp_minus_logsumexp": _exp_minus_lse,
    "logsumexp_by_hand": _hand_lse,
    "softmax_base_two": _base_two,
    "softmax_by_l1_norm": _power,
    "softmax_with_temperature": lambda z: F.softmax(z / 0.07, dim=-1),
    "log_softmax_by_hand": lambda z: z - z.logsumexp(-1, keepdim=True),
    "gumbel_soft": lambda z: F.gumbel_softmax(z, tau=0.5),
    "softmax_through_log": lambda z: torch.log(F.softmax(z, -1) + 1e-9),
    "exp_over_clamped_sum": lambda z: z.exp() / z.exp().sum(-1, keepdim=True).clamp(min=1e-9),
    "softmax_sharpened": lambda z: (lambda p: p / p.sum(-1, keepdim=True))(F.softmax(z, -1) ** 2),
    "softmax_in_double": lambda z: F.softmax(z, dim=-1, dtype=torch.float64).to(z.dtype),
    "negative_entropy_head": lambda z: (F.softmax(z, -1) * F.log_softmax(z, -1)).sum(-1),
}.items():

    def _build(fn=_fn):
        return Fn(lambda z: fn(z)), vec()

    _build.__name__ = _name
    case(SOFTMAX12)(_build)


@case(("em", "softmax", 5))
def softmax_over_channels():
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax(dim=1)), img()


@case(("em", "softmax", 49))
def spatial_softmax():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 10)

        def forward(self, x):
            z = self.c(x)
            return z.flatten(2).softmax(-1).view_as(z)

    return M(), img()


@case(("em", "softmax", 9))
def cosine_prototypes():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(9, 16))

        def forward(self, x):
            return (10 * F.normalize(x, dim=-1) @ F.normalize(self.p, dim=-1).T).softmax(-1)

    return M(), vec()


@case(("em", "softmax", 9))
def rbf_by_cdist():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(9, 16))

        def forward(self, x):
            k = torch.exp(-torch.cdist(x, self.p).pow(2) / 2)
            return k / (k.sum(-1, keepdim=True) + 1e-8)

    return M(), vec()


@case(("em", "softmax", 5))
def mixture_log_likelihood():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu, self.ls, self.w = (nn.Parameter(torch.randn(*s)) for s in ((5, 16), (5, 16), (5,)))

        def forward(self, x):
            q = -0.5 * ((x[:, None] - self.mu) / self.ls.exp()).pow(2).sum(-1) - self.ls.sum(-1)
            return torch.logsumexp(q + self.w, -1)

    return M(), vec()


@case(("em", "softmax", 5), ("em", "softmax", 5))
def mixture_with_learned_weights():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu, self.w = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(5))

        def forward(self, x):
            q = -0.5 * (x[:, None] - self.mu).pow(2).sum(-1)
            return torch.logsumexp(q + F.log_softmax(self.w, 0), -1)

    return M(), vec()


@case(("em", "softmax", 3))
def learned_mixing_weights():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x):
            w = self.w.softmax(0)
            return sum(w[i] * f(x) for i, f in enumerate(self.fc))

    return M(), vec()


@case(("em", "softmax", 4))
def dense_mixture_of_experts():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 4)
            self.experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))

        def forward(self, x):
            r = self.gate(x).softmax(-1)
            return (r.unsqueeze(-1) * torch.stack([e(x) for e in self.experts], 1)).sum(1)

    return M(), vec()


@case(("em", "softmax", 64))
def softmax_over_the_batch():
    return Fn(lambda z: F.softmax(z, dim=0)), vec()


@case(("em", "softmax", 6))
def attention_pooling_over_time():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(16, 1)

        def forward(self, x):
            return (self.score(x).softmax(1) * x).sum(1)

    return M(), seq()


@case(("em", "softmax", 6), ("em", "softmax", 10), objective="cross-entropy")
def attention_classifier():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.head = nn.Linear(16, 1), nn.Linear(16, 10)

        def forward(self, x):
            return self.head((self.score(x).softmax(1) * x).sum(1))

    return M(), seq()


class Attention(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.core = core

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.core(q, k, v).transpose(1, 2).flatten(-2)


def _masked(q, k, v):
    s = q @ k.mT / math.sqrt(8)
    return s.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


def _additive(q, k, v):
    return (q @ k.mT + torch.full((6, 6), torch.finfo(q.dtype).min).triu(1)).softmax(-1) @ v


def _unnormalized_first(q, k, v):
    e = (q @ k.mT).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def _sink_joined(q, k, v):
    s = q @ k.mT
    s = torch.cat([s, torch.zeros_like(s[..., :1]) + 0.3], -1)
    return s.softmax(-1)[..., :-1] @ v


def _sink_constant(q, k, v):
    e = (q @ k.mT).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def _talking(q, k, v):
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), 3), v)


for _name, _core, _k in (
    ("attention_masked", _masked, 6),
    ("attention_additive_mask", _additive, 6),
    (
        "attention_sdpa_boolean",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(6, 6).tril().bool()),
        6,
    ),
    ("attention_normalized_last", _unnormalized_first, 6),
    ("attention_sink_joined", _sink_joined, 7),
    ("attention_sink_constant", _sink_constant, 7),
    ("attention_einsum", _talking, 6),
):

    def _build(core=_core):
        return Attention(core), seq()

    _build.__name__ = _name
    case(("em", "softmax", _k))(_build)


@case(("em", "softmax", 6))
def attention_by_bmm_with_weights():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4)

        def forward(self, x):
            return self.attn(x, x, x)

    return M(), (torch.randn(6, 3, 16),)


@case(("em", "softmax", 9))
def cross_attention():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, memory):
            return self.attn(x, memory, memory)[0]

    return M(), (torch.randn(4, 6, 16), torch.randn(4, 9, 16))


@case(("em", "kernel", 6))
def cosine_attention_of_positive_features():
    def core(q, k, v):
        a = torch.sigmoid(q @ k.mT)
        return a / a.sum(-1, keepdim=True) @ v

    return Attention(core), seq()


@case(("em", "softmax", 12))
def sinkhorn():
    def f(z):
        p = torch.exp(z)
        for _ in range(3):
            p = p / p.sum(-1, keepdim=True)
            p = p / p.sum(-2, keepdim=True)
        return p

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 12)

        def forward(self, x):
            return f(self.fc(x))

    return M(), (torch.randn(4, 12, 16),)


@case(("em", "softmax", 12))
def sinkhorn_in_logs():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 12)

        def forward(self, x):
            z = self.fc(x)
            for _ in range(3):
                z = z - z.logsumexp(-1, keepdim=True)
                z = z - z.logsumexp(-2, keepdim=True)
            return z.exp()

    return M(), (torch.randn(4, 12, 16),)


# ---- kernels --------------------------------------------------------------------------------------
for _name, _fn in {
    "normalized_sigmoid": lambda z: torch.sigmoid(z) / torch.sigmoid(z).sum(-1, keepdim=True),
    "normalized_softplus": lambda z: F.normalize(F.softplus(z), p=1, dim=-1),
    "normalized_square": lambda z: z.square() / z.square().sum(-1, keepdim=True),
}.items():

    def _build(fn=_fn):
        return Fn(lambda z: fn(z)), vec()

    _build.__name__ = _name
    case(KERNEL12)(_build)


@case(("em", "kernel", 7))
def inverse_distance():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.randn(7, 16))

        def forward(self, x):
            k = 1 / (torch.cdist(x, self.mu) + 1e-3)
            return k / k.sum(-1, keepdim=True)

    return M(), vec()


@case(("em", "kernel", 7))
def student_t_with_degrees():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.randn(7, 16))

        def forward(self, x):
            q = (1 + (x[:, None] - self.mu).pow(2).sum(-1) / 3).pow(-2)
            return (q.t() / q.sum(1)).t()

    return M(), vec()


# ---- selection ------------------------------------------------------------------------------------
@case(("hard", "selection", 9))
def max_pool_three_by_three():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2)), img()


@case(("hard", "selection", 14))
def global_max_over_time():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveMaxPool1d(1)), (torch.randn(4, 3, 16),)


@case(("hard", "selection", 6))
def max_over_tokens():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            return self.fc(x).max(dim=1).values

    return M(), seq()


@case(("hard", "selection", 2))
def maximum_of_two_layers():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            return torch.maximum(self.a(x), self.b(x))

    return M(), vec()


@case(("hard", "selection", 10))
def argmax_prediction():
    return Fn(lambda z: z.argmax(-1), 10), vec()


@case(("hard", "selection", 10))
def argmax_of_softmax():
    return Fn(lambda z: F.softmax(z, -1).argmax(-1), 10), vec()


@case(("hard", "selection", 12))
def gumbel_hard():
    return Fn(lambda z: F.gumbel_softmax(z, hard=True)), vec()


@case(("hard", "selection", 32))
def quantizer_with_straight_through():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)
            self.code = nn.Parameter(torch.randn(32, 4))

        def forward(self, x):
            z = self.fc(x)
            d = z.pow(2).sum(1, keepdim=True) - 2 * z @ self.code.t() + self.code.pow(2).sum(1)
            onehot = F.one_hot(d.argmin(1), 32).float()
            q = onehot @ self.code
            return z + (q - z).detach()

    return M(), vec()


@case(("hard", "selection", 16))
def ema_quantizer():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)
            self.register_buffer("code", torch.randn(16, 4))

        def forward(self, x):
            z = self.fc(x)
            return F.embedding(torch.cdist(z, self.code).argmin(-1), self.code)

    return M(), vec()


# ---- truncation -----------------------------------------------------------------------------------
class Router(nn.Module):
    """``route(logits) -> (weights, indices)``; experts are modules in a loop, or a parameter that is indexed."""

    def __init__(self, route, loop=True, experts=8):
        super().__init__()
        self.gate = nn.Linear(16, experts)
        self.route, self.loop = route, loop
        if loop:
            self.experts = nn.ModuleList(nn.Linear(16, 4) for _ in range(experts))
        else:
            self.experts = nn.Parameter(torch.randn(experts, 16, 4))

    def forward(self, x):
        w, i = self.route(self.gate(x))
        if not self.loop:
            return torch.einsum("nk,nd,nkdo->no", w, x, self.experts[i])
        out = x.new_zeros(x.shape[0], 4)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(i == e)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * w[rows, slot, None])
        return out


def _softmax_topk(z):
    w, i = z.softmax(-1).topk(2, -1)
    return w / w.sum(-1, keepdim=True), i


def _topk_softmax(z):
    w, i = z.topk(2, -1)
    return w.softmax(-1), i


def _topk_sigmoid(z):
    w, i = z.topk(2, -1)
    return w.sigmoid(), i


def _sigmoid_topk(z):
    s = z.sigmoid()
    i = s.topk(2, -1).indices
    w = s.gather(-1, i)
    return w / (w.sum(-1, keepdim=True) + 1e-20), i


def _grouped(z):
    s = z.sigmoid()
    groups = s.view(-1, 4, 2).topk(2, -1).values.sum(-1)
    keep = torch.zeros_like(groups).scatter(1, groups.topk(2, -1).indices, 1)
    masked = s.masked_fill(~keep.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8).bool(), 0.0)
    i = masked.topk(2, -1).indices
    w = s.gather(-1, i)
    return w / w.sum(-1, keepdim=True), i


def _switch(z):
    p = z.softmax(-1)
    w, i = p.max(-1, keepdim=True)
    return w, i


def _argmax(z):
    i = z.argmax(-1, keepdim=True)
    return z.softmax(-1).gather(-1, i), i


for _name, _route in {
    "softmax_then_top_k": _softmax_topk,
    "top_k_then_softmax": _topk_softmax,
    "top_k_then_sigmoid": _topk_sigmoid,
    "sigmoid_then_top_k": _sigmoid_topk,
    "group_limited_top_k": _grouped,
    "switch_top_one": _switch,
    "argmax_router": _argmax,
}.items():
    for _loop in (True, False):

        def _build(route=_route, loop=_loop):
            return Router(route, loop), vec()

        _build.__name__ = f"router_{_name}_{'loop' if _loop else 'indexed'}"
        case(("hard", "truncation", 8))(_build)


@case(("hard", "truncation", 4))
def router_by_masked_softmax():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 4)
            self.experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))

        def forward(self, x):
            z = self.gate(x)
            kth = z.topk(2, -1).values[..., -1:]
            r = z.masked_fill(z < kth, -math.inf).softmax(-1)
            return (r.unsqueeze(-1) * torch.stack([e(x) for e in self.experts], 1)).sum(1)

    return M(), vec()


@case(("hard", "truncation", 32))
def top_k_latents():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            z = self.enc(x)
            v, i = z.topk(4, -1)
            return self.dec(torch.zeros_like(z).scatter(-1, i, F.relu(v)))

    return M(), vec()


@case(("hard", "truncation", 12))
def normalized_relu():
    return Fn(lambda z: F.relu(z) / (F.relu(z).sum(-1, keepdim=True) + 1e-6)), vec()


@case(("hard", "truncation", 12))
def sparsemax():
    def f(z):
        s, _ = z.sort(-1, descending=True)
        k = torch.arange(1, 13)
        c = s.cumsum(-1) - 1
        support = (s * k > c).sum(-1, keepdim=True)
        tau = c.gather(-1, support - 1) / support
        return (z - tau).clamp(min=0)

    return Fn(f), vec()


# ---- look-alikes ----------------------------------------------------------------------------------
@case()
def standardize_by_hand():
    return Fn(lambda z: (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-5)), vec()


@case()
def rms_norm_by_hand():
    return Fn(lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)), vec()


@case()
def l1_normalized_signed():
    return Fn(lambda z: F.normalize(z, p=1, dim=-1)), vec()


@case()
def scale_by_maximum():
    return Fn(lambda z: z / z.abs().amax(-1, keepdim=True).clamp(min=1e-6)), vec()


@case()
def proportions_of_the_input():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            x = x.abs()
            return self.fc(x / x.sum(-1, keepdim=True))

    return M(), vec()


@case()
def weight_over_its_own_norm():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(8, 16))

        def forward(self, x):
            return x @ (self.w / self.w.sum(0)).t()

    return M(), vec()


@case()
def squashed_parameters():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)
            self.a, self.b, self.c = (nn.Parameter(torch.randn(8)) for _ in range(3))

        def forward(self, x):
            return self.fc(x) * F.softplus(self.a) + torch.sigmoid(self.b) - self.c.clamp(min=0)

    return M(), vec()


@case()
def integer_control_flow():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(20, 16), nn.Linear(16, 4)

        def forward(self, ids):
            lengths = (ids > 0).sum(1).clamp(min=1)
            last = ids.argmax(-1)
            x = self.emb(ids.clamp(max=19))
            return self.fc(x[torch.arange(len(ids)), last] / lengths.unsqueeze(-1))

    return M(), (torch.randint(0, 20, (8, 6)),)


@case()
def group_and_instance_norm():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.AvgPool2d(2)), img()


@case()
def masked_average_of_computed():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            mask = (x[..., :1] > 0).float()
            return (self.fc(x) * mask).sum(1) / mask.sum(1).clamp(min=1)

    return M(), seq()


@case()
def polynomial_features():
    return Fn(lambda z: torch.cat([z, z**2, z**3], -1)), vec()


# ---- what goes by all the uses of a value, not by the nearest one ---------------------------------
@case(THRESHOLD, THRESHOLD)
def residual_of_the_raw_input():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return F.relu(self.b(F.relu(self.a(x) + x)) + x)

    return M(), vec()


@case(("hard", "selection", 6))
def mean_and_max_pooling_added():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            h = self.fc(x)
            return h.mean(1) + h.amax(1)

    return M(), seq()


@case(("hard", "selection", 2))
def the_larger_of_two_layers_by_where():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return torch.where(a > b, a, b)

    return M(), vec()


@case(("em", "softmax", 3))
def logaddexp_of_three_layers():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))

        def forward(self, x):
            a, b, c = (f(x) for f in self.fc)
            return torch.logaddexp(torch.logaddexp(a, b), c)

    return M(), vec()


@case(("em", "softmax", 2))
def share_of_one_of_two_layers():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            a, b = self.a(x).exp(), self.b(x).exp()
            return a / (a + b)

    return M(), vec()


@case(("em", "softmax", 13))
def log_of_one_plus_sum():
    return Fn(lambda z: torch.log(1 + z.exp().sum(-1))), vec()


@case(("em", "softmax", 12))
def log_mean_exp():
    return Fn(lambda z: z.exp().mean(-1).log()), vec()


@case(("em", "softmax", 13))
def softmax_plus_one_stabilized():
    def f(z):
        m = z.amax(-1, keepdim=True).clamp(min=0)
        e = (z - m).exp()
        return e / ((-m).exp() + e.sum(-1, keepdim=True))

    return Fn(f), vec()


@case(("em", "softmax", 5))
def forward_algorithm():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.emit, self.move = nn.Linear(16, 5), nn.Parameter(torch.randn(5, 5))

        def forward(self, x):
            e = self.emit(x)
            alpha = e[:, 0]
            for t in range(1, x.shape[1]):
                alpha = torch.logsumexp(alpha[:, :, None] + self.move, 1) + e[:, t]
            return torch.logsumexp(alpha, 1)

    return M(), seq()


@case(("em", "softmax", 3))
def slots_that_share_the_tokens():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.v, self.slots = nn.Linear(16, 8), nn.Linear(16, 8), nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            a = (self.k(x) @ self.slots.T).softmax(-1) + 1e-8
            a = a / a.sum(1, keepdim=True)
            return a.mT @ self.v(x)

    return M(), seq()


@case(("hard", "truncation", 5))
def router_by_one_hot_dispatch():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.w = nn.Linear(16, 5), nn.Parameter(torch.randn(5, 16, 4))

        def forward(self, x):
            return torch.einsum("ne,nd,edo->no", F.one_hot(self.gate(x).argmax(-1), 5).float(), x, self.w)

    return M(), vec()


@case(("hard", "truncation", 5))
def router_by_hard_gumbel():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.w = nn.Linear(16, 5), nn.Parameter(torch.randn(5, 16, 4))

        def forward(self, x):
            return torch.einsum("ne,nd,edo->no", F.gumbel_softmax(self.gate(x), hard=True), x, self.w)

    return M(), vec()


@case()
def scaled_to_the_unit_interval():
    def f(z):
        low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
        return (z - low) / (high - low + 1e-6)

    return Fn(f), vec()
