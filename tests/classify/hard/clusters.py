"""Slots, clusters, memories, graphs, softmax over the batch, and normalizations that only look like it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.classify.hard.common import (
    THRESHOLD,
    TWO_WAY,
    Net,
    case,
    img,
    kernel,
    linears,
    seq,
    softmax,
    vec,
)


# ---- slots, clusters, capsules, memories ----------------------------------------------------------
@case(softmax(3), TWO_WAY, THRESHOLD)
def slot_attention():
    """Slots compete for inputs, weights renormalized over inputs, a GRU and an MLP per step, three steps."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.slots, self.cell = nn.Parameter(torch.randn(1, 3, 16)), nn.GRUCell(16, 16)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, x):
            k, v = self.k(x), self.v(x)
            slots = self.slots.expand(x.shape[0], -1, -1)
            for _ in range(3):
                before = slots
                dots = torch.einsum("bid,bjd->bij", self.q(F.layer_norm(slots, (16,))), k) * 0.25
                attn = dots.softmax(dim=1) + 1e-8
                attn = attn / attn.sum(dim=-1, keepdim=True)
                updates = torch.einsum("bjd,bij->bid", v, attn)
                slots = self.cell(updates.reshape(-1, 16), before.reshape(-1, 16)).view_as(before)
                slots = slots + self.mlp(F.layer_norm(slots, (16,)))
            return slots

    return M(), seq()


@case(softmax(5))
def aggregated_residuals_to_clusters():
    """NetVLAD: soft assignment by a 1 x 1 convolution, residuals to centroids, two normalizations."""

    def forward(m, x):
        n, c = x.shape[:2]
        x = F.normalize(x, p=2, dim=1)
        a = F.softmax(m.assign(x).view(n, 5, -1), dim=1)
        flat = x.view(n, c, -1)
        residual = flat.unsqueeze(1) - m.centroids.unsqueeze(0).unsqueeze(-1)
        v = (residual * a.unsqueeze(2)).sum(-1)
        return F.normalize(F.normalize(v, p=2, dim=2).view(n, -1), p=2, dim=1)

    return Net(forward, assign=nn.Conv2d(3, 5, 1), centroids=torch.rand(5, 3)), img(s=4)


@case(softmax(4))
def deep_encoding_of_residuals():
    """Texture encoding: exponentials of scaled squared distances over codewords."""

    def forward(m, x):
        x = m.fc(x)
        distance = ((x.unsqueeze(2) - m.words) ** 2).sum(-1) * m.scale
        a = distance.softmax(dim=2)
        return (a.unsqueeze(-1) * (x.unsqueeze(2) - m.words)).sum(1)

    return Net(forward, fc=nn.Linear(16, 8), words=torch.randn(4, 8), scale=-torch.rand(4)), seq()


@case(softmax(5))
def em_attention_over_bases():
    """EMANet: three rounds of responsibilities over bases and means of pixels, one competition."""

    def forward(m, x):
        x = m.conv(x).flatten(2)
        mu = m.bases.expand(x.shape[0], -1, -1)
        for _ in range(3):
            z = torch.softmax(x.transpose(1, 2) @ mu, dim=2)
            weights = z / (1e-6 + z.sum(dim=1, keepdim=True))
            mu = F.normalize(x @ weights, dim=1)
        return mu @ z.transpose(1, 2)

    return Net(forward, conv=nn.Conv2d(3, 8, 1), bases=torch.randn(1, 8, 5)), img(s=4)


@case(softmax(7))
def memory_addressed_by_content():
    def forward(m, x):
        key = m.key(x)
        similarity = F.cosine_similarity(key.unsqueeze(1) + 1e-16, m.memory.unsqueeze(0) + 1e-16, dim=-1)
        return F.softmax(10.0 * similarity, dim=1) @ m.memory

    return Net(forward, key=nn.Linear(16, 8), memory=torch.randn(7, 8)), vec()


@case(kernel(7))
def clusters_by_heavy_tails():
    """Deep embedded clustering with its exponent, transposed for the division."""

    def forward(m, x):
        z = m.enc(x)
        q = 1.0 / (1.0 + torch.sum(torch.pow(z.unsqueeze(1) - m.centers, 2), 2) / 1.0)
        q = q.pow((1.0 + 1.0) / 2.0)
        return (q.t() / torch.sum(q, 1)).t()

    return Net(forward, enc=nn.Linear(16, 4), centers=torch.randn(7, 4)), vec()


@case(softmax(5))
def prototypes_of_few_shots():
    """Prototypes are class means of the support set; queries are scored by negative squared distance."""

    def forward(m, support, query):
        prototypes = m.enc(support).view(5, 3, -1).mean(1)
        d = torch.pow(m.enc(query).unsqueeze(1) - prototypes.unsqueeze(0), 2).sum(2)
        return F.log_softmax(-d, dim=1)

    return Net(forward, enc=nn.Linear(16, 8)), (torch.randn(15, 16), torch.randn(8, 16))


# ---- graphs ---------------------------------------------------------------------------------------
def graph():
    source = torch.arange(40) % 10
    target = (torch.arange(40) * 3 + torch.arange(40) // 10) % 10
    return torch.randn(10, 16), torch.stack([source, target])


@case(THRESHOLD, softmax(None))
def graph_attention_with_segment_maximum():
    def forward(m, x, edges):
        source, target = edges
        h = m.fc(x)
        e = F.leaky_relu((h * m.left).sum(-1)[source] + (h * m.right).sum(-1)[target], 0.2)
        top = torch.full((10,), -math.inf).scatter_reduce(0, target, e, reduce="amax")
        w = torch.exp(e - top[target])
        total = torch.zeros(10).scatter_add(0, target, w)
        a = w / (total[target] + 1e-16)
        return torch.zeros(10, 8).index_add(0, target, a.unsqueeze(-1) * h[source])

    return Net(forward, fc=nn.Linear(16, 8), left=torch.randn(8), right=torch.randn(8)), graph()


@case(softmax(None))
def graph_transformer_by_index_add():
    def forward(m, x, edges):
        source, target = edges
        q, k, v = (f(x) for f in m.qkv)
        s = ((q[target] * k[source]).sum(-1) / 4.0).exp()
        total = torch.zeros(10).index_add_(0, target, s)
        out = torch.zeros(10, 16).index_add_(0, target, s.unsqueeze(-1) * v[source])
        return out / (total.unsqueeze(-1) + 1e-16)

    return Net(forward, qkv=linears(3)), graph()


@case(THRESHOLD, softmax(10))
def graph_attention_on_a_dense_adjacency():
    def forward(m, x, edges):
        adjacency = torch.zeros(10, 10).index_put((edges[1], edges[0]), torch.ones(40))
        h = m.fc(x)
        e = F.leaky_relu(h @ m.left + (h @ m.right).T, 0.2)
        a = F.softmax(torch.where(adjacency > 0, e, -9e15 * torch.ones_like(e)), dim=1)
        return a @ h

    return Net(forward, fc=nn.Linear(16, 8), left=torch.randn(8, 1), right=torch.randn(8, 1)), graph()


@case(THRESHOLD)
def graph_convolution_with_degrees():
    """Symmetric degree normalization: a property of the graph, no competition."""

    def forward(m, x, edges):
        degree = torch.zeros(10).scatter_add_(0, edges[1], torch.ones(40)).clamp(min=1)
        norm = degree.pow(-0.5)[edges[0]] * degree.pow(-0.5)[edges[1]]
        h = m.fc(x)
        return F.relu(torch.zeros(10, 8).index_add(0, edges[1], norm.unsqueeze(-1) * h[edges[0]]))

    return Net(forward, fc=nn.Linear(16, 8)), graph()


@case(TWO_WAY, kernel(None), also=[[kernel(None)]])
def edges_gated_and_normalized():
    """Gated graph network: sigmoid edge gates over their sum at every node."""

    def forward(m, x, edges):
        source, target = edges
        gate = torch.sigmoid(m.a(x)[target] + m.b(x)[source])
        num = torch.zeros(10, 8).index_add(0, target, gate * m.v(x)[source])
        return m.u(x) + num / (torch.zeros(10, 8).index_add(0, target, gate) + 1e-6)

    return Net(forward, **{n: nn.Linear(16, 8) for n in "abuv"}), graph()


# ---- over the batch -------------------------------------------------------------------------------
@case(softmax(64))
def normalized_over_samples_by_hand():
    def forward(m, x):
        e = torch.exp(m.head(x) - m.head(x).max(0, keepdim=True).values)
        return e / e.sum(0)

    return Net(forward, head=nn.Linear(16, 10)), vec()


@case(softmax(8))
def contrast_with_the_rest_of_the_batch():
    def forward(m, x, y):
        a, b = F.normalize(m.image(x), dim=-1), F.normalize(m.text(y), dim=-1)
        return F.log_softmax(a @ b.T * m.scale.exp(), dim=1).diagonal()

    return Net(forward, image=nn.Linear(16, 8), text=nn.Linear(16, 8), scale=torch.tensor(2.6)), (*vec(8), *vec(8))


# ---- look-alikes ----------------------------------------------------------------------------------
@case()
def mean_of_unpadded_tokens():
    def forward(m, x, mask):
        h = m.fc(x)
        mask = mask.unsqueeze(-1).expand(h.size()).float()
        return torch.sum(h * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)

    return Net(forward, fc=nn.Linear(16, 8)), (*seq(), (torch.arange(6) < 5).long().expand(4, 6))


@case()
def whitening_and_response_normalization():
    """Global response normalization and a division by the mean magnitude: norms, no alternatives."""

    def forward(m, x):
        h = m.conv(x)
        g = torch.norm(h, p=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(dim=1, keepdim=True) + 1e-6)
        h = m.gamma * (h * n) + m.beta + h
        return h / h.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)

    return Net(forward, conv=nn.Conv2d(3, 8, 3), gamma=torch.zeros(1, 8, 1, 1), beta=torch.zeros(1, 8, 1, 1)), img()


@case()
def weights_normalized_before_use():
    """Weight standardization and spectral scaling: functions of parameters alone."""

    def forward(m, x):
        w = m.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        h = F.conv2d(x, w, m.conv.bias).mean((2, 3))
        u = F.normalize(m.fc.weight @ m.v, dim=0)
        return F.linear(h, m.fc.weight / (u @ m.fc.weight @ m.v))

    net = Net(forward, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 4))
    net.register_buffer("v", torch.randn(8))
    return net, img()


@case()
def distances_and_similarities_alone():
    def forward(m, x):
        h = m.fc(x)
        return (
            torch.cdist(h, m.points),
            F.cosine_similarity(h.unsqueeze(1), m.points, dim=-1),
            torch.exp(-h.pow(2).sum(-1)),
        )

    return Net(forward, fc=nn.Linear(16, 4), points=torch.randn(7, 4)), vec()
