"""The basic truth table: small networks, one per idea, with the rows that the theory gives them.

Each case is ``(module, inputs)``; expected are the rows whose verdict is not ``none`` as (verdict, mechanism, K).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

CASES: dict[str, tuple] = {}


def case(*expected, objective=None):
    def register(builder):
        CASES[builder.__name__] = (builder, list(expected), objective)
        return builder

    return register


class Fn(nn.Module):
    """Linear(16 -> width) followed by a plain function of its output."""

    def __init__(self, fn, width=12):
        super().__init__()
        self.fc = nn.Linear(16, width)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.fc(x))


def vec(n=64):
    return (torch.randn(n, 16),)


def img(n=8, c=3, s=16):
    return (torch.randn(n, c, s, s),)


# ---- the seed's own table -------------------------------------------------------------------
@case(
    ("hard", "threshold", 2),
    ("hard", "threshold", 2),
    ("hard", "threshold", 2),
    ("em", "softmax", 10),
    objective="cross-entropy",
)
def typical_relu_classifier():
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
    ), vec()


@case(("em", "logistic", 2), ("em", "softmax", 10))
def tanh_classifier():
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10), nn.Softmax(-1)), vec()


# ---- threshold gates ------------------------------------------------------------------------
@case(("hard", "threshold", 2))
def relu_functional():
    return Fn(F.relu), vec()


@case(("hard", "threshold", 2))
def relu_clamp():
    return Fn(lambda z: z.clamp(min=0)), vec()


@case(("hard", "threshold", 2))
def relu_where():
    return Fn(lambda z: torch.where(z > 0, z, torch.zeros_like(z))), vec()


@case(("hard", "threshold", 2))
def relu_by_mask():
    return Fn(lambda z: z * (z > 0)), vec()


@case(("hard", "threshold", 2))
def relu_squared():
    return Fn(lambda z: F.relu(z).square()), vec()


@case(("hard", "threshold", 2))
def leaky_relu():
    return Fn(F.leaky_relu), vec()


@case(("hard", "threshold", 2))
def hardswish():
    return Fn(F.hardswish), vec()


@case(("hard", "threshold", 2))
def elu():
    return Fn(F.elu), vec()


class SharedReLU(nn.Module):
    """One nn.ReLU instance called after two different layers: two rows, not one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(16, 12), nn.Linear(12, 8), nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


@case(("hard", "threshold", 2), ("hard", "threshold", 2))
def relu_module_reused():
    return SharedReLU(), vec()


@case(("hard", "threshold", 2), ("hard", "selection", 4), ("hard", "threshold", 2))
def cnn_with_max_pool():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).eval(), img()


# ---- logistic (two-way) competition ---------------------------------------------------------
@case(("em", "logistic", 2))
def sigmoid_method():
    return Fn(lambda z: z.sigmoid()), vec()


@case(("em", "logistic", 2))
def softplus():
    return Fn(F.softplus), vec()


@case(("em", "logistic", 2))
def silu():
    return Fn(F.silu), vec()


@case(("em", "logistic", 2))
def quick_gelu():
    return Fn(lambda z: z * torch.sigmoid(1.702 * z)), vec()


@case(("em", "logistic", 2))
def gelu_tanh_form():
    return Fn(lambda z: F.gelu(z, approximate="tanh")), vec()


@case(("em", "logistic", 2))
def glu():
    return Fn(lambda z: F.glu(z, -1)), vec()


@case(("em", "logistic", 2))
def lstm():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(16, 12, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    return M(), (torch.randn(8, 5, 16),)


# ---- smooth gates that are no log-sum-exp ---------------------------------------------------
@case(("soft", "smooth-gate", 2))
def gelu_erf():
    return Fn(F.gelu), vec()


@case(("soft", "smooth-gate", 2))
def softsign():
    return Fn(F.softsign), vec()


# ---- softmax competition --------------------------------------------------------------------
@case(("em", "softmax", 12))
def softmax_functional():
    return Fn(lambda z: F.softmax(z, dim=-1)), vec()


@case(("em", "softmax", 12))
def log_softmax_module():
    return nn.Sequential(nn.Linear(16, 12), nn.LogSoftmax(dim=1)), vec()


@case(("em", "softmax", 12))
def softmin():
    return nn.Sequential(nn.Linear(16, 12), nn.Softmin(dim=1)), vec()


@case(("em", "softmax", 12))
def softmax_by_hand():
    return Fn(lambda z: z.exp() / z.exp().sum(-1, keepdim=True)), vec()


@case(("em", "softmax", 12))
def softmax_by_hand_stable():
    def f(z):
        e = torch.exp(z - z.max(dim=-1, keepdim=True).values)  # the max is part of the softmax, no selection
        return e / e.sum(dim=-1, keepdim=True)

    return Fn(f), vec()


@case(("em", "softmax", 12))
def free_energy():
    return Fn(lambda z: -torch.logsumexp(-z, dim=-1)), vec()


class GaussianPrototypes(nn.Module):
    """Responsibilities of 7 prototypes under squared Mahalanobis distance (diagonal metric)."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.randn(7, 16))
        self.log_s = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        d = (((x[:, None] - self.mu) * self.log_s.exp()) ** 2).sum(-1) / 2
        k = torch.exp(-d)
        return (k / k.sum(1, keepdim=True)) @ self.mu


@case(("em", "softmax", 7))
def gaussian_prototypes():
    return GaussianPrototypes(), vec()


class StudentT(GaussianPrototypes):
    """Heavy-tailed soft assignment (deep embedded clustering): normalized, no exponential."""

    def forward(self, x):
        k = 1 / (1 + ((x[:, None] - self.mu) ** 2).sum(-1))
        return k / k.sum(1, keepdim=True)


@case(("em", "kernel", 7))
def student_t_assignment():
    return StudentT(), vec()


class ImplicitEMLayer(nn.Module):
    """Distances calibrated by a negative log-softmin."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 9)

    def forward(self, x):
        d = F.softplus(self.fc(x))
        return d + torch.logsumexp(-d, dim=1, keepdim=True)


@case(("em", "logistic", 2), ("em", "softmax", 9))
def negative_log_softmin():
    return ImplicitEMLayer(), vec()


# ---- attention ------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.core = core

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.core(q, k, v).transpose(1, 2).flatten(-2)


def seq(n=4, t=6):
    return (torch.randn(n, t, 16),)


@case(("em", "softmax", 6))
def attention_sdpa():
    return Attention(F.scaled_dot_product_attention), seq()


@case(("em", "softmax", 6))
def attention_sdpa_causal():
    return Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), seq()


@case(("em", "softmax", 6))
def attention_by_einsum():
    return Attention(
        lambda q, k, v: torch.einsum(
            "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(8)).softmax(-1), v
        )
    ), seq()


@case(("em", "softmax", 6))
def multihead_attention_module():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    return M().eval(), seq()


@case(("em", "softmax", 6), ("hard", "threshold", 2), ("em", "softmax", 6), ("hard", "threshold", 2))
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval(), seq()


# ---- selection and truncation ---------------------------------------------------------------
@case(("hard", "selection", 3))
def maxout():
    return Fn(lambda z: z.unflatten(-1, (4, 3)).amax(-1)), vec()


class NearestCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.code = nn.Embedding(32, 4)

    def forward(self, x):
        return self.code(torch.cdist(self.fc(x), self.code.weight).argmin(-1))


@case(("hard", "selection", 32))
def vector_quantizer():
    return NearestCode(), vec()


class TopKRouter(nn.Module):
    """Softmax over 8 experts, the best 2 kept and renormalized; the other 6 get exactly zero."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 8)
        self.experts = nn.Parameter(torch.randn(8, 16, 4))

    def forward(self, x):
        w, i = self.gate(x).softmax(-1).topk(2, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        return torch.einsum("nk,nd,nkdo->no", w, x, self.experts[i])


@case(("hard", "truncation", 8))
def top_k_router():
    return TopKRouter(), vec()


# ---- look-alikes: normalization, but not over alternatives ----------------------------------
@case()
def batch_and_layer_norm():
    return nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.LayerNorm(12), nn.Dropout()).eval(), vec()


@case()
def l2_normalize():
    return Fn(lambda z: F.normalize(z, dim=-1)), vec()


@case()
def exp_not_normalized():
    return Fn(torch.exp), vec()


@case()
def softmax_of_one():
    return Fn(lambda z: F.softmax(z, -1), width=1), vec()


class MeanPool(nn.Module):
    """Weights mask/mask.sum() are nonnegative and sum to one, yet nothing competes."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 16)

    def forward(self, ids):
        mask = (ids > 0).float()
        return (self.emb(ids) * (mask / mask.sum(1, keepdim=True).clamp(min=1e-9)).unsqueeze(-1)).sum(1)


@case()
def masked_mean_pool():
    return MeanPool(), (torch.randint(0, 50, (8, 6)),)
