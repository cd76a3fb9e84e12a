"""Selections and top-k sets outside routers: pooling over tokens, decoding, pruning, indexers."""

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
    img,
    linears,
    selection,
    seq,
    softmax,
    truncation,
    vec,
)


# ---- maxima over tokens, pixels, neighbours -------------------------------------------------------
@case(selection(6))
def maximum_of_unmasked_tokens():
    def forward(m, x, mask):
        h = m.fc(x)
        h = h.masked_fill(mask.unsqueeze(-1) == 0, -1e9)
        return m.head(torch.max(h, 1)[0])

    return Net(forward, fc=nn.Linear(16, 8), head=nn.Linear(8, 3)), (*seq(), (torch.arange(6) < 5).expand(4, 6).long())


@case(THRESHOLD, selection(5), THRESHOLD, selection(4))
def text_convolutions_with_maximum_over_time():
    def forward(m, x):
        x = x.transpose(1, 2)
        pooled = [F.max_pool1d(h, h.shape[2]).squeeze(2) for h in (F.relu(conv(x)) for conv in m.convs)]
        return m.fc(torch.cat(pooled, 1))

    convs = nn.ModuleList(nn.Conv1d(16, 8, k) for k in (2, 3))
    return Net(forward, convs=convs, fc=nn.Linear(16, 3)), seq()


@case(THRESHOLD, THRESHOLD, selection(32))
def shared_perceptron_with_maximum_over_points():
    """PointNet: one network per point, batch norm, the maximum over the cloud."""

    def forward(m, x):
        x = F.relu(m.bn1(m.conv1(x)))
        x = F.relu(m.bn2(m.conv2(x)))
        return m.fc(torch.max(x, 2, keepdim=True)[0].view(-1, 16))

    layers = {
        "conv1": nn.Conv1d(3, 8, 1),
        "conv2": nn.Conv1d(8, 16, 1),
        "bn1": nn.BatchNorm1d(8),
        "bn2": nn.BatchNorm1d(16),
    }
    return Net(forward, fc=nn.Linear(16, 4), **layers), (torch.randn(4, 3, 32),)


@case(THRESHOLD, selection(5))
def edge_convolution_of_nearest_neighbours():
    """Neighbours of the raw points choose no parameter; the maximum over the five neighbours is a row (DGCNN)."""

    def forward(m, x):
        distance = -torch.cdist(x, x)
        index = distance.topk(5, dim=-1)[1]
        near = x.unsqueeze(1).expand(-1, 20, -1, -1).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 3))
        center = x.unsqueeze(2).expand_as(near)
        h = F.leaky_relu(m.conv(torch.cat([near - center, center], -1)), 0.2)
        return h.max(dim=2)[0]

    return Net(forward, conv=nn.Linear(6, 16)), (torch.randn(4, 20, 3),)


@case(selection(None))
def maximum_over_the_neighbours_of_a_graph():
    def forward(m, x, edges):
        h = m.fc(x)
        out = torch.full_like(h, -math.inf)
        index = edges[1].unsqueeze(-1).expand(-1, h.shape[1])
        return out.scatter_reduce(0, index, h[edges[0]], reduce="amax", include_self=False)

    edges = torch.stack([torch.arange(30) % 10, (torch.arange(30) * 7 + torch.arange(30) // 10) % 10])
    return Net(forward, fc=nn.Linear(16, 8)), (torch.randn(10, 16), edges)


@case(THRESHOLD, TWO_WAY, selection(64), selection(8), TWO_WAY)
def channel_and_spatial_attention():
    """CBAM: one small network on means and maxima over space, then a gate from means and maxima over channels."""

    def forward(m, x):
        x = m.conv(x)

        def mlp(t):
            return m.fc2(F.relu(m.fc1(t)))

        gate = torch.sigmoid(mlp(F.adaptive_avg_pool2d(x, 1)) + mlp(F.adaptive_max_pool2d(x, 1)))
        x = x * gate
        both = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(m.space(both))

    layers = {"conv": nn.Conv2d(3, 8, 1), "fc1": nn.Conv2d(8, 2, 1), "fc2": nn.Conv2d(2, 8, 1)}
    return Net(forward, space=nn.Conv2d(2, 1, 3, padding=1), **layers), img(s=8)


@case(selection(3))
def maxout_of_separate_layers():
    def forward(m, x):
        return torch.stack([f(x) for f in m.pieces], dim=0).max(dim=0)[0]

    return Net(forward, pieces=linears(3)), vec()


@case(selection(3), also=[[selection(2), selection(2)]])
def maxout_by_nested_maximum():
    def forward(m, x):
        a, b, c = (f(x) for f in m.pieces)
        return torch.maximum(torch.maximum(a, b), c)

    return Net(forward, pieces=linears(3)), vec()


@case(selection(2))
def max_feature_map():
    """The larger half of the channels (LightCNN)."""

    def forward(m, x):
        a, b = torch.split(m.conv(x), 4, 1)
        return torch.max(a, b)

    return Net(forward, conv=nn.Conv2d(3, 8, 3)), img()


@case(selection(6))
def late_interaction():
    """ColBERT: every query token takes its best document token, the maxima are summed."""

    def forward(m, query, document):
        q, d = F.normalize(m.fc(query), dim=-1), F.normalize(m.fc(document), dim=-1)
        return (q @ d.mT).max(dim=-1).values.sum(-1)

    return Net(forward, fc=nn.Linear(16, 8)), (torch.randn(4, 3, 16), torch.randn(4, 6, 16))


# ---- argmax ---------------------------------------------------------------------------------------
@case(selection(11), TWO_WAY)
def greedy_decoding():
    """A cell fed with the embedding of its own best guess."""

    def forward(m, x):
        h = m.start(x)
        token = torch.zeros(x.shape[0], dtype=torch.long)
        out = []
        for _ in range(4):
            h = m.cell(m.emb(token), h)
            token = m.head(h).argmax(dim=-1)
            out.append(token)
        return torch.stack(out, 1)

    layers = {"emb": nn.Embedding(11, 8), "cell": nn.GRUCell(8, 12), "head": nn.Linear(12, 11)}
    return Net(forward, start=nn.Linear(16, 12), **layers), vec()


@case(selection(5), selection(9))
def two_predicted_labels():
    def forward(m, x):
        h = m.body(x)
        return {"intent": m.intent(h).argmax(-1), "slot": torch.max(m.slot(h), -1).indices}

    return Net(forward, body=nn.Linear(16, 8), intent=nn.Linear(8, 5), slot=nn.Linear(8, 9)), vec()


@case()
def argmax_of_token_ids():
    """The position of the end token is found in the ids, no layer computes it (CLIP's text pooling)."""

    def forward(m, ids):
        h = m.fc(m.emb(ids))
        return h[torch.arange(h.shape[0]), ids.to(dtype=torch.int).argmax(dim=-1)]

    return Net(forward, emb=nn.Embedding(20, 16), fc=nn.Linear(16, 8)), (torch.randint(0, 20, (8, 6)),)


# ---- top-k sets -----------------------------------------------------------------------------------
@case(softmax(6), truncation(5))
def tokens_pruned_by_class_attention():
    """EViT: the tokens that the class token attends to most go on."""

    def forward(m, x):
        q, k, v = (heads(f(x)) for f in m.qkv)
        p = (q @ k.mT / math.sqrt(8)).softmax(-1)
        x = (p @ v).transpose(1, 2).flatten(2)
        index = p[:, :, 0, 1:].mean(1).topk(3, dim=1, largest=True, sorted=True)[1]
        kept = x[:, 1:].gather(1, index.unsqueeze(-1).expand(-1, -1, 16))
        return torch.cat([x[:, :1], kept], 1)

    return Net(forward, qkv=linears(3)), seq()


@case(truncation(12))
def proposals_by_their_best_score():
    """Two-stage detection: encoder tokens ranked by a class score become queries."""

    def forward(m, x):
        scores = m.classes(x)
        top = torch.topk(scores[..., 0], 3, dim=1)[1]
        boxes = torch.gather(m.boxes(x), 1, top.unsqueeze(-1).repeat(1, 1, 4))
        return boxes, x.gather(1, top.unsqueeze(-1).repeat(1, 1, 16))

    return Net(forward, classes=nn.Linear(16, 5), boxes=nn.Linear(16, 4)), seq(4, 12)


@case(selection(5), truncation(12), also=[[truncation(12)]])
def proposals_by_the_best_of_all_classes():
    def forward(m, x):
        scores = m.classes(x)
        top = torch.topk(scores.max(-1).values, 3, dim=1).indices
        return m.boxes(x).gather(1, top.unsqueeze(-1).expand(-1, -1, 4))

    return Net(forward, classes=nn.Linear(16, 5), boxes=nn.Linear(16, 4)), seq(4, 12)


@case(THRESHOLD, truncation(6), softmax(6))
def sparse_attention_with_an_indexer():
    """A small scorer (ReLU of query-key products, weighted) picks the keys that attention may see (DeepSeek 3.2)."""

    def forward(m, x):
        iq, ik = m.iq(x).unflatten(-1, (2, 4)), m.ik(x)
        score = F.relu(torch.einsum("bqhd,bkd->bqhk", iq, ik))
        score = torch.einsum("bqhk,bqh->bqk", score, m.iw(x))
        index = score.topk(3, dim=-1)[1]
        mask = torch.full_like(score, float("-inf")).scatter_(-1, index, 0)
        q, k, v = (heads(f(x)) for f in m.qkv)
        return ((q @ k.mT / math.sqrt(8)) + mask.unsqueeze(1)).softmax(-1) @ v

    return Net(forward, qkv=linears(3), iq=nn.Linear(16, 8), ik=nn.Linear(16, 4), iw=nn.Linear(16, 2)), seq()


@case(truncation(3), softmax(6))
def blocks_of_keys_chosen_by_their_mean():
    """Mixture of block attention: each query sees the two blocks whose mean key it likes best."""

    def core(m, q, k, v):
        blocks = k.unflatten(2, (3, 2)).mean(3)
        index = (q @ blocks.mT).topk(2, dim=-1).indices
        chosen = torch.zeros(4, 2, 6, 3, dtype=torch.bool).scatter_(-1, index, True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chosen.repeat_interleave(2, dim=-1))

    return Attention(core), seq()


@case(truncation(6))
def depth_of_tokens():
    """Mixture of depths: the tokens with the largest score pass the block, the others go around it."""

    def forward(m, x):
        weight, index = torch.topk(m.router(x).squeeze(-1), 2, dim=1)
        at = index.unsqueeze(-1).expand(-1, -1, 16)
        return x.scatter_add(1, at, m.block(x.gather(1, at)) * weight.unsqueeze(-1))

    return Net(forward, router=nn.Linear(16, 1), block=nn.Linear(16, 16)), seq()


@case(TWO_WAY, truncation(20), also=[[truncation(20)]])
def graph_pooling_by_projected_score():
    def forward(m, x):
        score = torch.tanh((x @ m.p) / m.p.norm(p=2))
        top, index = score.topk(10)
        return m.fc(x[index] * top.view(-1, 1))

    return Net(forward, p=torch.randn(16), fc=nn.Linear(16, 4)), vec(20)


@case(truncation(12))
def activations_at_least_the_kth():
    def forward(m, x):
        z = m.fc(x)
        return m.o(z * (z >= z.topk(3, dim=-1).values[:, -1:]).float())

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(truncation(12), softmax(12), also=[[truncation(12)]])
def nucleus_of_the_distribution():
    def forward(m, x):
        z = m.fc(x)
        ordered, index = torch.sort(z, descending=False)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 0.1
        drop[..., -1:] = 0
        z = z.masked_fill(drop.scatter(1, index, drop), -float("inf"))
        return z.softmax(-1)

    return Net(forward, fc=nn.Linear(16, 12)), vec()


@case(truncation(12))
def sparsemax_by_projection():
    def forward(m, x):
        z = m.fc(x)
        z = z - z.max(dim=-1, keepdim=True)[0]
        s = torch.sort(z, dim=-1, descending=True)[0]
        steps = torch.arange(1, 13).view(1, -1)
        inside = 1 + steps * s > s.cumsum(-1)
        k = (inside * steps).max(-1, keepdim=True)[0]
        tau = ((inside * s).sum(-1, keepdim=True) - 1) / k
        return m.o(torch.max(torch.zeros_like(z), z - tau))

    return Net(forward, fc=nn.Linear(16, 12), o=nn.Linear(12, 4)), vec()


@case(truncation(12))
def entmax_by_bisection():
    def forward(m, x):
        z = m.fc(x) * 0.5
        top = z.max(dim=-1, keepdim=True)[0]
        low, width = top - 1, 1 - 12**-0.5
        for _ in range(20):
            width = width / 2
            middle = low + width
            p = torch.clamp(z - middle, min=0) ** 2
            low = torch.where(p.sum(-1, keepdim=True) >= 1, middle, low)
        return p / p.sum(-1, keepdim=True)

    return Net(forward, fc=nn.Linear(16, 12)), vec()
