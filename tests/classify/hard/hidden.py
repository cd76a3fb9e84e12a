"""Custom functions, distributions, losses, parametrizations: what hides the operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    THRESHOLD,
    TWO_WAY,
    Net,
    case,
    img,
    linears,
    seq,
    softmax,
    vec,
)


# ---- what hides the operators ---------------------------------------------------------------------
class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * torch.sigmoid(z)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        s = torch.sigmoid(z)
        return grad * (s * (1 + z * (1 - s)))


@case(TWO_WAY)
def swish_that_saves_memory():
    def forward(m, x):
        return SwishFunction.apply(m.fc(x))

    return Net(forward, fc=nn.Linear(16, 12)), vec()


class SignFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return torch.where(z >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad


@case(THRESHOLD)
def sign_with_a_gradient_of_its_own():
    def forward(m, x):
        return m.o(SignFunction.apply(m.fc(x)))

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(THRESHOLD)
def block_under_checkpointing():
    def forward(m, x):
        return torch.utils.checkpoint.checkpoint(lambda z: F.relu(m.fc(z)), x, use_reentrant=False)

    return Net(forward, fc=nn.Linear(16, 12)), vec()


@case(softmax(10))
def entropy_of_a_distribution_object():
    def forward(m, x):
        return torch.distributions.Categorical(logits=m.fc(x)).entropy()

    return Net(forward, fc=nn.Linear(16, 10)), vec()


@case(softmax(5), softmax(5))
def mixture_of_distribution_objects():
    def forward(m, x):
        mix = torch.distributions.Categorical(logits=m.w)
        parts = torch.distributions.Independent(torch.distributions.Normal(m.mu, m.log_s.exp()), 1)
        return torch.distributions.MixtureSameFamily(mix, parts).log_prob(x)

    return Net(forward, w=torch.randn(5), mu=torch.randn(5, 16), log_s=torch.zeros(5, 16)), vec()


@case(softmax(10))
def loss_inside_forward():
    def forward(m, x, y):
        z = m.fc(x)
        return F.cross_entropy(z, y, label_smoothing=0.1), z

    return Net(forward, fc=nn.Linear(16, 10)), (*vec(), torch.randint(0, 10, (64,)))


@case(softmax(10), softmax(10), detached=True)
def student_and_teacher():
    def forward(m, x):
        student = F.log_softmax(m.student(x) / 2.0, dim=-1)
        with torch.no_grad():
            teacher = F.softmax(m.teacher(x) / 2.0, dim=-1)
        return F.kl_div(student, teacher, reduction="batchmean") * 4.0

    return Net(forward, student=nn.Linear(16, 10), teacher=nn.Linear(16, 10)), vec()


@case(THRESHOLD, TWO_WAY)
def normalized_weights_by_parametrization():
    fc = nn.utils.parametrizations.weight_norm(nn.Linear(16, 12))
    out = nn.utils.parametrizations.spectral_norm(nn.Linear(12, 4))
    return nn.Sequential(fc, nn.LeakyReLU(0.2), out, nn.Tanh()), vec()


@case(THRESHOLD)
def ensemble_by_batched_weights():
    def forward(m, x):
        h = F.relu(torch.baddbmm(m.b1, x.unsqueeze(0).expand(3, -1, -1), m.w1))
        return torch.baddbmm(m.b2, h, m.w2).mean(0)

    sizes = {"w1": (3, 16, 12), "b1": (3, 1, 12), "w2": (3, 12, 4), "b2": (3, 1, 4)}
    return Net(forward, **{name: torch.randn(*size) for name, size in sizes.items()}), vec()


@case(THRESHOLD)
def complex_numbers_with_a_threshold_on_the_modulus():
    def forward(m, x):
        z = torch.complex(m.re(x), m.im(x))
        size = z.abs()
        return torch.view_as_real(F.relu(size + m.b) / (size + 1e-5) * z)

    return Net(forward, re=nn.Linear(16, 8), im=nn.Linear(16, 8), b=torch.full((8,), -0.3)), vec()


@case(THRESHOLD)
def half_of_the_channels_rectified_in_place():
    def forward(m, x):
        h = m.conv(x)
        h[:, :4] = h[:, :4].clamp(min=0)
        return h

    return Net(forward, conv=nn.Conv2d(3, 8, 3)), img()


@case(softmax(8))
def attention_in_a_child_of_its_own():
    class Core(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.transpose(-2, -1) / 4.0, dim=-1) @ v

    def forward(m, x):
        return m.core(*(f(x) for f in m.qkv))

    return Net(forward, qkv=linears(3), core=Core()), seq(4, 8)
