"""Squashed parameters and clamps that guard; layers that are shared, modules that are swapped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    SMOOTH,
    THRESHOLD,
    TWO_WAY,
    Attention,
    Net,
    case,
    img,
    linears,
    selection,
    seq,
    softmax,
    vec,
)


# ---- squashed parameters and quiet parts ----------------------------------------------------------
@case()
def residual_scales_of_every_kind():
    """Scales from parameters alone: layer scale, tanh of a learned gate, sigmoid of a mixing weight."""

    def forward(m, x):
        x = x + m.gamma * m.a(x)
        x = x + torch.tanh(m.alpha) * m.b(x)
        mix = torch.sigmoid(m.beta)
        return mix * x + (1 - mix) * m.c(x)

    parts = {"gamma": torch.full((16,), 1e-2), "alpha": torch.zeros(1), "beta": torch.zeros(1)}
    return Net(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16), **parts), vec()


@case()
def contrastive_scale():
    def forward(m, x, y):
        a, b = F.normalize(m.image(x), dim=-1), F.normalize(m.text(y), dim=-1)
        return m.scale.exp().clamp(max=100.0) * a @ b.t()

    return Net(forward, image=nn.Linear(16, 8), text=nn.Linear(16, 8), scale=torch.tensor(2.6)), (*vec(8), *vec(8))


@case()
def positive_and_bounded_weights():
    """Weights through softplus, relu, tanh and a hard step before they meet the input."""

    def forward(m, x):
        x = F.linear(x, F.softplus(m.w1))
        x = F.linear(x, F.relu(m.w2))
        x = F.linear(x, torch.tanh(m.w3) * (m.w4 > 0))
        return F.linear(x, m.w4 / (m.w4.norm(dim=1, keepdim=True) + 1e-6) * m.g.abs())

    return Net(forward, g=torch.ones(16, 1), **{f"w{i}": torch.randn(16, 16) for i in (1, 2, 3, 4)}), vec()


@case(THRESHOLD)
def stochastic_depth_and_dropout_in_evaluation():
    def forward(m, x):
        for a in m.layers:
            keep = 0.9
            branch = F.dropout(a(x), 0.1, m.training)
            if m.training:
                branch = branch.div(keep) * (torch.rand(x.shape[0], 1) + keep).floor()
            x = x + branch
        return F.relu(m.o(x))

    return Net(forward, layers=linears(3), o=nn.Linear(16, 8)), vec()


# ---- clamps that guard ----------------------------------------------------------------------------
def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


@case(TWO_WAY, TWO_WAY)
def boxes_refined_in_logit_space():
    """Detection transformers: reference points by a sigmoid, offsets added to their inverse sigmoid."""

    def forward(m, x):
        reference = m.points(x).sigmoid()
        box = m.delta(x)
        box = torch.cat([box[..., :2] + inverse_sigmoid(reference), box[..., 2:]], -1)
        return box.sigmoid()

    return Net(forward, points=nn.Linear(16, 2), delta=nn.Linear(16, 4)), seq()


@case(TWO_WAY, TWO_WAY)
def boxes_refined_layer_by_layer():
    def forward(m, x):
        reference, boxes = m.query.sigmoid().expand(x.shape[0], -1, -1), []
        for head in m.heads:
            boxes.append(torch.sigmoid(torch.special.logit(reference, eps=1e-5) + head(x)))
            reference = boxes[-1].detach()
        return torch.stack(boxes)

    return Net(forward, heads=linears(2, 16, 4), query=torch.randn(1, 6, 4)), seq()


@case(softmax(6), SMOOTH)
def encoder_layer_with_half_precision_guard():
    """The clamp after a block keeps half precision finite, it gates nothing (BART, Wav2Vec2, T5)."""

    def forward(m, x):
        h = x + m.attn(x, x, x, need_weights=False)[0]
        h = h + m.down(F.gelu(m.up(F.layer_norm(h, (16,)))))
        limit = torch.finfo(h.dtype).max - 1000
        h = torch.clamp(h, min=-limit, max=limit)
        return torch.nan_to_num(h, nan=0.0, posinf=65504, neginf=-65504)

    attn = nn.MultiheadAttention(16, 2, batch_first=True)
    return Net(forward, attn=attn, up=nn.Linear(16, 32), down=nn.Linear(32, 16)), seq()


@case()
def statistics_pooling():
    def forward(m, x):
        h = m.fc(x)
        mean = h.mean(1)
        var = (h.pow(2).mean(1) - mean.pow(2)).clamp(min=1e-5)
        return torch.cat([mean, var.sqrt()], -1)

    return Net(forward, fc=nn.Linear(16, 8)), seq()


@case(THRESHOLD)
def generalized_mean_pooling_after_relu():
    def forward(m, x):
        x = F.relu(m.conv(x))
        return x.clamp(min=1e-6).pow(m.p).mean((2, 3)).pow(1.0 / m.p)

    return Net(forward, conv=nn.Conv2d(3, 8, 3), p=torch.tensor(3.0)), img()


@case(softmax(10))
def angular_margin_head():
    """ArcFace: the root of 1 - cos^2 is guarded, the target's angle widened, a softmax over classes."""

    def forward(m, x, y):
        cosine = F.linear(F.normalize(x), F.normalize(m.weight))
        sine = torch.sqrt((1.0 - torch.pow(cosine, 2)).clamp(0, 1))
        phi = cosine * math.cos(0.5) - sine * math.sin(0.5)
        onehot = torch.zeros_like(cosine).scatter_(1, y.view(-1, 1).long(), 1)
        return F.log_softmax(30.0 * (onehot * phi + (1.0 - onehot) * cosine), dim=1)

    return Net(forward, weight=torch.randn(10, 16)), (*vec(), torch.randint(0, 10, (64,)))


@case()
def reparametrized_latent_in_evaluation():
    def forward(m, x):
        mu, logvar = m.fc(x).chunk(2, -1)
        std = torch.exp(0.5 * logvar)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(-1)
        return m.decode(mu + 0 * std), kl

    return Net(forward, fc=nn.Linear(16, 8), decode=nn.Linear(4, 16)), vec()


# ---- shared layers, swapped modules, branches -----------------------------------------------------
@case(softmax(6), TWO_WAY)
def one_block_applied_three_times():
    """ALBERT: the same attention and feed-forward weights at every depth."""

    def gelu(x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def forward(m, x):
        for _ in range(3):
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in m.qkv)
            a = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
            x = F.layer_norm(x + m.o(a.transpose(1, 2).flatten(2)), (16,))
            x = F.layer_norm(x + m.down(gelu(m.up(x))), (16,))
        return x

    return Net(forward, qkv=linears(3), o=nn.Linear(16, 16), up=nn.Linear(16, 32), down=nn.Linear(32, 16)), seq()


@case(THRESHOLD, softmax(20))
def tied_embedding_and_decoder():
    def forward(m, ids):
        h = F.relu(m.fc(m.emb(ids)))
        return F.log_softmax(F.linear(h, m.emb.weight), -1)

    return Net(forward, emb=nn.Embedding(20, 16), fc=nn.Linear(16, 16)), (torch.randint(0, 20, (4, 6)),)


@case(THRESHOLD)
def twins_with_one_encoder():
    def forward(m, x, y):
        return (m.out(F.relu(m.fc(x))) - m.out(F.relu(m.fc(y)))).abs()

    return Net(forward, fc=nn.Linear(16, 12), out=nn.Linear(12, 4)), (*vec(), *vec())


@case(TWO_WAY, THRESHOLD)
def activation_swapped_between_two_calls():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.Tanh()

        def forward(self, x):
            kept = self.act
            x = self.act(self.a(x))
            self.act = nn.ReLU()
            x = self.act(self.b(x))
            self.act = kept
            return x

    return M(), vec()


@case(THRESHOLD, TWO_WAY)
def layer_swapped_during_forward():
    """Slow and fast copies of a layer change places while the forward runs."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x):
            x = F.relu(self.layers[0](x))
            self.layers[0], self.layers[1] = self.layers[1], self.layers[0]
            x = torch.sigmoid(self.layers[0](x))
            self.layers[0], self.layers[1] = self.layers[1], self.layers[0]
            return x

    return M(), vec()


@case(TWO_WAY)
def activation_chosen_by_name():
    def forward(m, x):
        table = {"relu": torch.relu, "swish": lambda z: z * torch.sigmoid(z)}
        return m.down(table["swish"](m.up(x)))

    return Net(forward, up=nn.Linear(16, 32), down=nn.Linear(32, 16)), vec()


@case(TWO_WAY)
def branch_taken_by_the_data():
    """Only the branch that ran is in the report: these inputs are all positive."""

    def forward(m, x):
        if x.mean() > 0:
            return torch.tanh(m.a(x))
        return F.relu(m.b(x))

    return Net(forward, a=nn.Linear(16, 8), b=nn.Linear(16, 8)), (torch.rand(8, 16),)


@case(THRESHOLD, selection(4), THRESHOLD, selection(4), THRESHOLD)
def convolutions_by_functional_calls():
    def forward(m, x):
        x = F.max_pool2d(F.relu(m.conv1(x)), 2)
        x = F.relu(F.max_pool2d(m.conv2(x), 2))
        return m.fc2(F.relu(m.fc1(x.flatten(1))))

    convs = {"conv1": nn.Conv2d(3, 4, 3), "conv2": nn.Conv2d(4, 8, 3)}
    return Net(forward, fc1=nn.Linear(32, 12), fc2=nn.Linear(12, 4), **convs), img()


# ---- more clamps ---------------------------------------------------------------------------------------
@case(TWO_WAY)
def probability_kept_inside_for_its_logit():
    def forward(m, x):
        p = torch.clamp(torch.sigmoid(m.fc(x)), 1e-4, 1 - 1e-4)
        return torch.log(p) - torch.log1p(-p)

    return Net(forward, fc=nn.Linear(16, 5)), vec()


@case(softmax(6))
def scores_kept_inside_half_precision():
    def core(m, q, k, v):
        s = (q @ k.mT / math.sqrt(8)).clamp(min=torch.finfo(torch.float16).min, max=torch.finfo(torch.float16).max)
        return s.softmax(-1) @ v

    return Attention(core), seq()


@case(SMOOTH)
def hidden_states_clamped_only_when_infinite():
    def forward(m, x):
        h = m.down(F.gelu(m.up(x))) + x
        if torch.isinf(h).any() or torch.isnan(h).any():
            h = torch.clamp(h, min=-65503, max=65503)
        limit = torch.where(torch.isinf(h).any(), torch.finfo(h.dtype).max - 1000, torch.finfo(h.dtype).max)
        return torch.clamp(h, min=-limit, max=limit)

    return Net(forward, up=nn.Linear(16, 32), down=nn.Linear(32, 16)), vec()


@case()
def cosine_and_root_guards():
    """An angle between unit vectors: clamps keep the root and the arc cosine inside their domains."""

    def forward(m, x):
        h = m.fc(x)
        unit = h / h.pow(2).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        return unit, torch.acos((unit @ F.normalize(m.p, dim=0)).clamp(-1 + 1e-6, 1 - 1e-6))

    return Net(forward, fc=nn.Linear(16, 8), p=torch.randn(8, 3)), vec()


@case(THRESHOLD)
def clipped_action():
    """A clamp at values that the layer reaches is a gate."""
    return Net(lambda m, x: m.fc(x).clamp(-0.5, 0.5), fc=nn.Linear(16, 4)), vec()
