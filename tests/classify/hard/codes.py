"""Nearest codes, straight-through estimators and quantization."""

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
    selection,
    vec,
)


# ---- codes ----------------------------------------------------------------------------------------
@case(selection(32))
def codes_on_a_feature_map():
    def forward(m, x):
        z = m.encode(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, 4)
        d = (
            torch.sum(flat**2, 1, keepdim=True)
            + torch.sum(m.book.weight**2, 1)
            - 2 * torch.matmul(flat, m.book.weight.t())
        )
        index = torch.argmin(d, dim=1).unsqueeze(1)
        onehot = torch.zeros(index.shape[0], 32)
        onehot.scatter_(1, index, 1)
        q = torch.matmul(onehot, m.book.weight).view(z.shape)
        loss = F.mse_loss(q.detach(), z) + 0.25 * F.mse_loss(q, z.detach())
        q = z + (q - z).detach()
        return m.decode(q.permute(0, 3, 1, 2)), loss

    return Net(forward, encode=nn.Conv2d(3, 4, 1), book=nn.Embedding(32, 4), decode=nn.Conv2d(4, 3, 1)), img(s=4)


@case(selection(8), selection(8))
def residual_codes():
    def forward(m, x):
        rest, total = m.encode(x), 0
        for book in m.books:
            index = (-torch.cdist(rest, book.weight)).max(-1).indices
            q = book(index)
            rest, total = rest - q.detach(), total + q
        return m.decode(total)

    books = nn.ModuleList(nn.Embedding(8, 4) for _ in range(2))
    return Net(forward, encode=nn.Linear(16, 4), books=books, decode=nn.Linear(4, 16)), vec()


@case(selection(16))
def codes_by_cosine_with_ema_tables():
    def forward(m, x):
        z = F.normalize(m.encode(x), dim=-1)
        index = torch.einsum("nd,cd->nc", z, F.normalize(m.book, dim=-1)).argmax(dim=-1)
        return z + (F.one_hot(index, 16).type(z.dtype) @ m.book - z).detach()

    net = Net(forward, encode=nn.Linear(16, 4))
    net.register_buffer("book", torch.randn(16, 4))
    return net, vec()


@case(selection(10), selection(10))
def grouped_gumbel_codes():
    """wav2vec 2 in evaluation: argmax of each group's logits, scattered to one-hot, times the table."""

    def forward(m, x):
        outs = []
        for f in m.groups:
            z = f(x).view(-1, 10)
            onehot = z.new_zeros(*z.shape).scatter_(-1, z.argmax(dim=-1).view(-1, 1), 1.0)
            outs.append(onehot @ m.table)
        return torch.cat(outs, -1)

    return Net(forward, groups=linears(2, 16, 10), table=torch.randn(10, 4)), vec()


@case(selection(12))
def straight_through_one_hot():
    def forward(m, x):
        soft = m.fc(x).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.max(-1, keepdim=True)[1], 1.0)
        return m.o(hard - soft.detach() + soft)

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(selection(12))
def straight_through_sample():
    """A one-hot latent of a world model: hard one-hot forward, probabilities backward."""

    def forward(m, x):
        p = F.softmax(m.fc(x), -1)
        hard = F.one_hot(p.argmax(-1), 12).float()
        return m.o(hard.detach() + (p - p.detach()))

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(THRESHOLD)
def straight_through_sign():
    def forward(m, x):
        z = m.fc(x)
        return m.o((z.sign() - z).detach() + z)

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(THRESHOLD, also=[[TWO_WAY]])
def straight_through_bernoulli():
    def forward(m, x):
        p = torch.sigmoid(m.fc(x))
        return m.o((p > 0.5).float() - p.detach() + p)

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(TWO_WAY)
def finite_scalar_quantization():
    """A bounded value rounded with a straight-through gradient: the tanh is the gate, rounding is none."""

    def forward(m, x):
        z = torch.tanh(m.fc(x)) * 3.5
        return m.o(z + (z.round() - z).detach())

    return Net(forward, fc=nn.Linear(16, 5), o=nn.Linear(5, 16)), vec()


@case()
def fake_quantization_by_the_largest():
    """int8 in simulation: scale by the largest magnitude, round, scale back."""

    def forward(m, x):
        z = m.fc(x)
        scale = z.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127.0
        return z + ((z / scale).round() * scale - z).detach()

    return Net(forward, fc=nn.Linear(16, 12)), vec()


@case()
def ternary_and_eight_bit_linear():
    """BitNet: weights by their mean magnitude, activations by their largest; clamps guard the integer range."""

    def forward(m, x):
        x = F.layer_norm(x, (16,))
        scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
        x = x + ((x * scale).round().clamp_(-128, 127) / scale - x).detach()
        w = m.fc.weight
        size = w.abs().mean().clamp(min=1e-5)
        w = w + ((w / size).round().clamp(-1, 1) * size - w).detach()
        return F.linear(x, w)

    return Net(forward, fc=nn.Linear(16, 12)), vec()


@case()
def learned_mask_of_the_weights():
    def forward(m, x):
        soft = torch.sigmoid(m.scores)
        mask = (soft > 0.5).float() - soft.detach() + soft
        return F.linear(x, m.fc.weight * mask, m.fc.bias)

    return Net(forward, fc=nn.Linear(16, 12), scores=torch.randn(12, 16)), vec()
