"""Whole small blocks of networks that everybody knows."""

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
    truncation,
    vec,
)


# ---- transformers ---------------------------------------------------------------------------------
@case(softmax(6), THRESHOLD, softmax(5), softmax(6), THRESHOLD)
def encoder_and_decoder_of_torch():
    def forward(m, x, y):
        return m.net(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5))

    net = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    return Net(forward, net=net), (torch.randn(4, 6, 16), torch.randn(4, 5, 16))


@case(softmax(8))
def attention_with_learned_and_zero_keys():
    """``add_bias_kv`` and ``add_zero_attn``: two more alternatives, one learned, one of energy 0."""

    def forward(m, x):
        return m.attn(x, x, x)[0]

    return Net(
        forward, attn=nn.MultiheadAttention(16, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    ), seq()


@case(softmax(6), TWO_WAY)
def decoder_block_of_2019():
    """GPT-2: one addmm for queries, keys and values, a triangular buffer, the tanh form of GELU, tied logits."""

    def project(x, w, b):
        return torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], -1)

    def forward(m, ids):
        x = m.wte(ids) + m.wpe(torch.arange(6))
        q, k, v = project(F.layer_norm(x, (16,)), m.w_attn, m.b_attn).split(16, dim=2)
        s = torch.matmul(heads(q), heads(k).transpose(-1, -2)) / (8**0.5)
        s = torch.where(m.mask[:, :, :6, :6], s, torch.finfo(s.dtype).min)
        x = x + m.o(merge(torch.matmul(nn.functional.softmax(s, dim=-1), heads(v))))
        h = m.up(F.layer_norm(x, (16,)))
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return (x + m.down(h)) @ m.wte.weight.T

    layers = {
        "wte": nn.Embedding(20, 16),
        "wpe": nn.Embedding(8, 16),
        "up": nn.Linear(16, 64),
        "down": nn.Linear(64, 16),
    }
    net = Net(forward, o=nn.Linear(16, 16), w_attn=torch.randn(16, 48), b_attn=torch.zeros(48), **layers)
    net.register_buffer("mask", torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8))
    return net, (torch.randint(0, 20, (4, 6)),)


@case(softmax(6), TWO_WAY)
def decoder_block_of_2023():
    """Llama: RMS norm, rotary positions, grouped keys, SwiGLU."""

    def norm(x, w):
        return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)

    def rotate(x):
        f = torch.outer(torch.arange(6.0), 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8)))
        z = torch.view_as_complex(x.float().unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(f), f)).flatten(-2).type_as(x)

    def forward(m, x):
        h = norm(x, m.n1)
        q, k, v = heads(m.q(h), 2), heads(m.k(h), 1), heads(m.v(h), 1)
        a = F.scaled_dot_product_attention(
            rotate(q), rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
        )
        x = x + m.o(merge(a))
        h = norm(x, m.n2)
        return x + m.w2(F.silu(m.w1(h)) * m.w3(h))

    layers = {"q": nn.Linear(16, 16), "k": nn.Linear(16, 8), "v": nn.Linear(16, 8), "o": nn.Linear(16, 16)}
    mlp = {"w1": nn.Linear(16, 32), "w2": nn.Linear(32, 16), "w3": nn.Linear(16, 32)}
    return Net(forward, n1=torch.ones(16), n2=torch.ones(16), **layers, **mlp), seq()


@case(softmax(8), truncation(4))
def sparse_block_with_balance_loss():
    """The router's frequencies and mean probabilities also make an auxiliary loss: still one router."""

    def forward(m, x):
        x = x + m.attn(x, x, x, need_weights=False)[0]
        flat = x.reshape(-1, 16)
        p = F.softmax(m.gate(flat), dim=-1)
        w, index = torch.topk(p, 2, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        share = F.one_hot(index, 4).float().mean((0, 1))
        loss = 4 * (share * p.mean(0)).sum()
        return x + torch.einsum("nk,nd,nkdo->no", w, flat, m.w[index]).view_as(x), loss

    attn = nn.MultiheadAttention(16, 2, batch_first=True)
    return Net(forward, attn=attn, gate=nn.Linear(16, 4), w=torch.randn(4, 16, 16)), seq(8, 8)


@case(TWO_WAY, softmax(6), TWO_WAY, TWO_WAY, TWO_WAY)
def conformer_block():
    def forward(m, x):
        x = x + 0.5 * m.down1(F.silu(m.up1(x)))
        x = x + m.attn(x, x, x, need_weights=False)[0]
        h = F.glu(m.point1(x.transpose(1, 2)), dim=1)
        x = x + m.point2(F.silu(m.norm(m.depth(h)))).transpose(1, 2)
        x = x + 0.5 * m.down2(F.silu(m.up2(x)))
        return F.layer_norm(x, (16,))

    linear = {n: nn.Linear(16, 32) for n in ("up1", "up2")} | {n: nn.Linear(32, 16) for n in ("down1", "down2")}
    conv = {"point1": nn.Conv1d(16, 32, 1), "depth": nn.Conv1d(16, 16, 3, padding=1, groups=16)}
    norm, attn = nn.BatchNorm1d(16), nn.MultiheadAttention(16, 2, batch_first=True)
    return Net(forward, norm=norm, attn=attn, point2=nn.Conv1d(16, 16, 1), **linear, **conv), seq()


@case(softmax(5), SMOOTH)
def vision_transformer_with_layer_scale():
    def forward(m, x):
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.pos
        q, k, v = m.qkv(F.layer_norm(x, (16,))).reshape(-1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + m.g1 * m.o(merge(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)))
        x = x + m.g2 * m.down(F.gelu(m.up(F.layer_norm(x, (16,)))))
        return m.head(x[:, 0])

    tensors = {"cls": torch.randn(1, 1, 16), "pos": torch.randn(1, 5, 16), "g1": torch.ones(16), "g2": torch.ones(16)}
    layers = {"up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "o": nn.Linear(16, 16), "head": nn.Linear(16, 10)}
    return Net(forward, patch=nn.Conv2d(3, 16, 8, 8), qkv=nn.Linear(16, 48), **tensors, **layers), img()


@case(softmax(8), THRESHOLD, THRESHOLD, TWO_WAY)
def deformable_attention_and_box_head():
    """Weights over levels and points, values by bilinear sampling; boxes by a ReLU network and a sigmoid."""

    def forward(m, x):
        value = m.value(x).transpose(1, 2).view(4, 8, 2, 3)
        reference = torch.linspace(0.1, 0.9, 6).view(1, 6, 1, 1)
        offsets = m.offsets(x).view(4, 6, 8, 2)
        weights = F.softmax(m.weights(x), -1).view(4, 1, 6, 8)
        sampled = F.grid_sample(value, 2 * (reference + 0.1 * offsets) - 1, align_corners=False)
        h = m.o((sampled * weights).sum(-1).transpose(1, 2))
        return m.boxes(h).sigmoid()

    boxes = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    layers = {"value": nn.Linear(16, 8), "offsets": nn.Linear(16, 16), "weights": nn.Linear(16, 8)}
    return Net(forward, o=nn.Linear(8, 16), boxes=boxes, **layers), seq()


@case(TWO_WAY, TWO_WAY, softmax(6), softmax(11))
def translation_decoder_with_attention():
    """A GRU cell in a loop, additive attention over the source at every step, log-probabilities of words."""

    def forward(m, x, ids):
        h, out = x.mean(1), []
        keys = m.key(x)
        for t in range(ids.shape[1]):
            e = m.v(torch.tanh(m.query(h).unsqueeze(1) + keys)).squeeze(2)
            a = F.softmax(e, dim=1)
            c = torch.bmm(a.unsqueeze(1), x).squeeze(1)
            h = m.cell(torch.cat([m.emb(ids[:, t]), c], -1), h)
            out.append(F.log_softmax(m.out(h), dim=-1))
        return torch.stack(out, 1)

    layers = {"key": nn.Linear(16, 8), "query": nn.Linear(16, 8), "v": nn.Linear(8, 1), "emb": nn.Embedding(11, 8)}
    return Net(forward, cell=nn.GRUCell(24, 16), out=nn.Linear(16, 11), **layers), (
        *seq(),
        torch.randint(0, 11, (4, 3)),
    )


# ---- convolutional and others ---------------------------------------------------------------------
@case(THRESHOLD, TWO_WAY)
def attention_gate_of_a_segmentation_network():
    def forward(m, x, signal):
        a = F.relu(m.x(x) + m.g(signal))
        return x * torch.sigmoid(m.psi(a))

    return Net(forward, x=nn.Conv2d(3, 4, 1), g=nn.Conv2d(3, 4, 1), psi=nn.Conv2d(4, 1, 1)), (*img(), *img())


@case(THRESHOLD, THRESHOLD, THRESHOLD)
def bottleneck_with_projection():
    def forward(m, x):
        h = F.relu(m.n1(m.c1(x)))
        h = F.relu(m.n2(m.c2(h)))
        return F.relu(m.n3(m.c3(h)) + m.n4(m.down(x)), inplace=True)

    convs = {
        "c1": nn.Conv2d(3, 4, 1),
        "c2": nn.Conv2d(4, 4, 3, padding=1),
        "c3": nn.Conv2d(4, 8, 1),
        "down": nn.Conv2d(3, 8, 1),
    }
    norms = {"n1": nn.BatchNorm2d(4), "n2": nn.BatchNorm2d(4), "n3": nn.BatchNorm2d(8), "n4": nn.BatchNorm2d(8)}
    return Net(forward, **convs, **norms), img()


@case(selection(4))
def maximum_indices_reused_for_unpooling():
    def forward(m, x):
        h, index = F.max_pool2d(m.enc(x), 2, 2, return_indices=True)
        return m.dec(F.max_unpool2d(h, index, 2, 2))

    return Net(forward, enc=nn.Conv2d(3, 4, 3, padding=1), dec=nn.Conv2d(4, 3, 3, padding=1)), img()


@case()
def power_average_pooling():
    """torch writes it with sign, relu and abs, whose product is the identity."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LPPool2d(2, 2)), img()


@case()
def local_response_normalization():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3)), img()


@case(softmax(5))
def softmax_of_feature_maps():
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax2d()), img()


@case(THRESHOLD)
def recurrent_network_with_relu():
    def forward(m, x):
        return m.rnn(x)[0]

    return Net(forward, rnn=nn.RNN(16, 12, nonlinearity="relu", batch_first=True)), seq()


@case(TWO_WAY)
def recurrent_network_on_packed_sequences():
    def forward(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 5, 3, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0]

    return Net(forward, rnn=nn.LSTM(16, 12, batch_first=True, bidirectional=True)), seq()


@case(TWO_WAY)
def recurrent_cell_of_torch():
    def forward(m, x):
        h = torch.zeros(x.shape[0], 12)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return h

    return Net(forward, cell=nn.RNNCell(16, 12)), seq()


@case(THRESHOLD)
def spiking_neurons():
    """Leaky integrate and fire: a step of the membrane over time, reset by subtraction."""

    def forward(m, x):
        v, out = torch.zeros(x.shape[0], 12), []
        for t in range(x.shape[1]):
            v = 0.9 * v + m.fc(x[:, t])
            spike = (v > 0.3).float()
            v = v - 0.3 * spike
            out.append(spike)
        return torch.stack(out, 1)

    return Net(forward, fc=nn.Linear(16, 12)), seq()


@case(THRESHOLD, selection(5))
def dueling_values_and_greedy_action():
    def forward(m, x):
        h = F.relu(m.body(x))
        a = m.advantage(h)
        q = m.value(h) + a - a.mean(-1, keepdim=True)
        return q.argmax(dim=1)

    return Net(forward, body=nn.Linear(16, 12), advantage=nn.Linear(12, 5), value=nn.Linear(12, 1)), vec()


@case(TWO_WAY)
def one_stage_detection_head():
    """YOLO: one sigmoid over everything, then boxes by arithmetic on its slices."""

    def forward(m, x):
        y = m.head(x).permute(0, 2, 3, 1).sigmoid()
        xy, wh, conf = y.split((2, 2, 4), -1)
        return torch.cat([xy * 2 - 0.5, (wh * 2) ** 2, conf], -1)

    return Net(forward, head=nn.Conv2d(3, 8, 1)), img(s=4)


@case(softmax(3))
def estimates_fused_by_precision():
    """Three estimates weighted by exp(-log variance) over the sum of these."""

    def forward(m, x):
        mean = torch.stack([f(x) for f in m.means], 1)
        precision = torch.exp(-torch.stack([f(x) for f in m.logvars], 1))
        return (mean * precision).sum(1) / precision.sum(1)

    return Net(forward, means=linears(3, 16, 4), logvars=linears(3, 16, 4)), vec()


@case(softmax(3))
def capsules_routed_by_agreement():
    def forward(m, x):
        votes = m.votes(x).unflatten(-1, (3, 8))
        b = torch.zeros(4, 6, 3)
        for _ in range(3):
            c = F.softmax(b, dim=-1)
            v = F.normalize((c.unsqueeze(-1) * votes).sum(1), dim=-1)
            b = b + (votes * v.unsqueeze(1)).sum(-1)
        return v

    return Net(forward, votes=nn.Linear(16, 24)), seq()


@case(SMOOTH)
def spatial_gating_without_a_gate():
    """gMLP: the product with a projected half is no competition; the GELU before it is the gate."""

    def forward(m, x):
        u, v = F.gelu(m.up(x)).chunk(2, -1)
        v = F.conv1d(F.layer_norm(v, (16,)), m.spatial, m.bias)
        return m.down(u * v)

    tensors = {"spatial": torch.randn(6, 6, 1) * 0.1, "bias": torch.ones(6)}
    return Net(forward, up=nn.Linear(16, 32), down=nn.Linear(16, 16), **tensors), seq()
