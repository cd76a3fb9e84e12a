"""Softmax of learned vectors, output heads, and attention pooling."""

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


# ---- softmax over a learned vector ----------------------------------------------------------------
@case(softmax(4))
def layers_mixed_by_learned_scalars():
    """ELMo and wav2vec 2: hidden states of all depths, weighted by a softmax of one scalar each."""

    def forward(m, x):
        states = [x]
        for layer in m.layers:
            states.append(layer(states[-1]))
        weights = F.softmax(m.scalars, dim=-1)
        return m.gamma * (torch.stack(states, 1) * weights.view(-1, 1, 1)).sum(1)

    return Net(forward, layers=linears(3), scalars=torch.zeros(4), gamma=torch.ones(1)), seq()


@case(softmax(3), THRESHOLD)
def operations_mixed_by_architecture_weights():
    """DARTS: one softmax per edge over candidate operations, one of them with a ReLU."""

    def forward(m, x):
        alpha = m.alpha.softmax(-1)
        for edge in alpha:
            x = edge[0] * x + edge[1] * m.plain(x) + edge[2] * F.relu(m.rectified(x))
        return x

    return Net(forward, alpha=torch.randn(2, 3), plain=nn.Linear(16, 16), rectified=nn.Linear(16, 16)), vec()


@case(softmax(3))
def convolution_with_normalized_taps():
    """Lightweight convolution: the kernel's taps are a softmax of parameters, shared by channels of a head."""

    def forward(m, x):
        weight = F.softmax(m.weight, dim=-1).repeat_interleave(4, dim=0)
        return m.o(F.conv1d(x.transpose(1, 2), weight, padding=1, groups=16).transpose(1, 2))

    return Net(forward, weight=torch.randn(4, 1, 3), o=nn.Linear(16, 16)), seq()


@case(softmax(3))
def convolution_with_predicted_taps():
    """Dynamic convolution: every position predicts its own taps and normalizes them."""

    def forward(m, x):
        taps = F.softmax(m.taps(x).unflatten(-1, (4, 3)), dim=-1)
        windows = F.pad(m.v(x), (0, 0, 1, 1)).unfold(1, 3, 1).unflatten(2, (4, 4))
        return torch.einsum("bthdk,bthk->bthd", windows, taps).flatten(2)

    return Net(forward, taps=nn.Linear(16, 12), v=nn.Linear(16, 16)), seq()


@case(softmax(5), softmax(5))
def free_energy_of_a_mixture_with_prior():
    """Log-density of a Gaussian mixture; the prior is a softmax of parameters, the posterior is propagated."""

    def forward(m, x):
        log_prior = F.log_softmax(m.logits, dim=-1)
        z = (m.enc(x).unsqueeze(1) - m.mean) / F.softplus(m.scale)
        log_density = -0.5 * z.pow(2).sum(-1) - torch.log(F.softplus(m.scale)).sum(-1)
        joint = log_density + log_prior
        return -joint.logsumexp(dim=-1)

    parts = {"logits": torch.randn(5), "mean": torch.randn(5, 4), "scale": torch.rand(5, 4)}
    return Net(forward, enc=nn.Linear(16, 4), **parts), vec()


# ---- heads ----------------------------------------------------------------------------------------
@case(softmax(7), softmax(4), softmax(3))
def adaptive_softmax():
    """A head of 5 frequent classes and 2 clusters, clusters of 4 and 3."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.AdaptiveLogSoftmaxWithLoss(16, 12, cutoffs=[5, 9], div_value=2.0)

        def forward(self, x):
            return self.head.log_prob(x)

    return M(), vec()


@case(softmax(6), softmax(4), softmax(3))
def adaptive_softmax_by_hand():
    def forward(m, x):
        head = F.log_softmax(m.head(x), dim=1)
        out = [head[:, :4]]
        for i, (down, up) in enumerate(zip(m.down, m.up, strict=True)):
            tail = F.log_softmax(up(down(x)), dim=1)
            out.append(head[:, 4 + i, None] + tail)
        return torch.cat(out, 1)

    up = nn.ModuleList([nn.Linear(8, 4, bias=False), nn.Linear(4, 3, bias=False)])
    down = nn.ModuleList([nn.Linear(16, 8, bias=False), nn.Linear(16, 4, bias=False)])
    return Net(forward, head=nn.Linear(16, 6), up=up, down=down), vec()


@case(softmax(3), softmax(4))
def classes_in_two_levels():
    def forward(m, x):
        group = m.group(x).softmax(-1)
        inside = m.inside(x).unflatten(-1, (3, 4)).softmax(-1)
        return (group.unsqueeze(-1) * inside).flatten(1)

    return Net(forward, group=nn.Linear(16, 3), inside=nn.Linear(16, 12)), vec()


@case(softmax(5), softmax(5), also=[[softmax(5)]])
def mixture_density_likelihood():
    """Mixing weights from the network, Gaussians from the network, the log-partition over both."""

    def forward(m, x):
        h = m.body(x)
        log_pi = F.log_softmax(m.pi(h), dim=-1)
        mu, log_sigma = m.mu(h), m.log_sigma(h)
        log_prob = -0.5 * ((m.target - mu) / log_sigma.exp()) ** 2 - log_sigma
        return torch.logsumexp(log_pi + log_prob, dim=-1)

    heads = {n: nn.Linear(8, 5) for n in ("pi", "mu", "log_sigma")}
    net = Net(forward, body=nn.Linear(16, 8), **heads)
    net.register_buffer("target", torch.zeros(1))
    return net, vec()


@case(softmax(5), TWO_WAY)
def mixture_density_parameters():
    def forward(m, x):
        pi, mu, sigma = m.pi(x), m.mu(x), m.sigma(x)
        return pi.softmax(-1), mu, F.softplus(sigma) + 1e-3

    return Net(forward, pi=nn.Linear(16, 5), mu=nn.Linear(16, 5), sigma=nn.Linear(16, 5)), vec()


@case(softmax(10))
def energy_of_a_classifier():
    def forward(m, x):
        z = m.head(m.body(x))
        return -0.5 * torch.logsumexp(z / 0.5, dim=1)

    return Net(forward, body=nn.Linear(16, 12), head=nn.Linear(12, 10)), vec()


@case(TWO_WAY)
def focal_weights():
    def forward(m, x):
        p = torch.sigmoid(m.head(x))
        return 0.25 * (1 - p) ** 2 * -torch.log(p.clamp(min=1e-8))

    return Net(forward, head=nn.Linear(16, 5)), vec()


@case(softmax(10))
def focal_weights_of_classes():
    def forward(m, x):
        log_p = F.log_softmax(m.head(x), dim=-1)
        return -((1 - log_p.exp()) ** 2 * log_p)

    return Net(forward, head=nn.Linear(16, 10)), vec()


@case(softmax(10), TWO_WAY)
def softmax_with_predicted_temperature():
    def forward(m, x):
        temperature = F.softplus(m.temperature(x)) + 0.1
        return F.softmax(m.head(x) / temperature, dim=-1)

    return Net(forward, head=nn.Linear(16, 10), temperature=nn.Linear(16, 1)), vec()


@case(softmax(16))
def box_distances_by_expected_bins():
    """Distribution focal loss: each side of a box is the mean of a softmax over bins, by a fixed convolution."""

    def forward(m, x):
        b, _, a = (z := m.head(x).flatten(2)).shape
        return m.project(z.view(b, 4, 16, a).transpose(2, 1).softmax(1)).view(b, 4, a)

    net = Net(forward, head=nn.Conv2d(3, 64, 1), project=nn.Conv2d(16, 1, 1, bias=False))
    net.project.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)
    net.project.weight.requires_grad_(False)
    return net, img(s=4)


@case(softmax(9))
def flow_upsampled_by_convex_combination():
    """RAFT: every fine pixel is a softmax mean of its nine coarse neighbours."""

    def forward(m, x):
        flow, mask = m.flow(x), m.mask(x)
        n, _, h, w = flow.shape
        mask = torch.softmax(mask.view(n, 1, 9, 2, 2, h, w), dim=2)
        up = F.unfold(2 * flow, [3, 3], padding=1).view(n, 2, 9, 1, 1, h, w)
        return torch.sum(mask * up, dim=2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 2 * h, 2 * w)

    return Net(forward, flow=nn.Conv2d(3, 2, 1), mask=nn.Conv2d(3, 36, 1)), img(s=4)


@case(softmax(8))
def disparity_by_soft_argmin():
    def forward(m, x):
        cost = m.cost(x).squeeze(1)
        p = F.softmax(-cost, dim=1)
        return torch.sum(p * torch.arange(8.0).view(1, 8, 1, 1), dim=1)

    return Net(forward, cost=nn.Conv3d(2, 1, 1)), (torch.randn(2, 2, 8, 4, 4),)


@case(softmax(16))
def keypoints_by_spatial_mean():
    def forward(m, x):
        h = m.heat(x)
        p = F.softmax(h.view(*h.shape[:2], -1), dim=-1)
        grid = torch.linspace(-1, 1, 4)
        p = p.view_as(h)
        return torch.stack([(p.sum(2) * grid).sum(-1), (p.sum(3) * grid).sum(-1)], -1)

    return Net(forward, heat=nn.Conv2d(3, 5, 1)), img(s=4)


@case(softmax(3), softmax(11), TWO_WAY)
def pointer_generator():
    """A vocabulary softmax and attention over the source, mixed by a sigmoid switch and scattered together."""

    def forward(m, x, ids):
        state = x.mean(1)
        attention = ((m.key(x) @ m.query(state).unsqueeze(-1)).squeeze(-1)).softmax(-1)
        context = (attention.unsqueeze(1) @ x).squeeze(1)
        both = torch.cat([state, context], -1)
        switch = torch.sigmoid(m.switch(both))
        vocabulary = switch * m.out(both).softmax(-1)
        return vocabulary.scatter_add(1, ids, (1 - switch) * attention)

    layers = {"key": nn.Linear(16, 8), "query": nn.Linear(16, 8), "switch": nn.Linear(32, 1), "out": nn.Linear(32, 11)}
    return Net(forward, **layers), (torch.randn(4, 3, 16), torch.randint(0, 11, (4, 3)))


# ---- attention pooling ----------------------------------------------------------------------------
@case(TWO_WAY, softmax(6))
def additive_attention_pooling():
    """Bahdanau: v . tanh(W h), masked, softmax over time, a weighted mean."""

    def forward(m, x):
        e = m.v(torch.tanh(m.w(x))).squeeze(-1)
        e = e.masked_fill(torch.arange(6) >= 5, -1e9)
        a = F.softmax(e, dim=1)
        return torch.bmm(a.unsqueeze(1), x).squeeze(1)

    return Net(forward, w=nn.Linear(16, 8), v=nn.Linear(8, 1, bias=False)), seq()


@case(TWO_WAY, TWO_WAY, softmax(6))
def gated_attention_pooling_of_a_bag():
    """Multiple-instance learning: tanh and sigmoid branches multiplied, then a softmax over instances."""

    def forward(m, x):
        a = m.w(torch.tanh(m.v(x)) * torch.sigmoid(m.u(x)))
        a = F.softmax(torch.transpose(a, 2, 1), dim=2)
        return torch.matmul(a, x).squeeze(1)

    return Net(forward, v=nn.Linear(16, 8), u=nn.Linear(16, 8), w=nn.Linear(8, 1)), seq()


@case(softmax(64))
def global_context_block():
    def forward(m, x):
        b, c, h, w = x.shape
        mask = m.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask).view(b, c, 1, 1)
        return x + m.add(context)

    return Net(forward, mask=nn.Conv2d(3, 1, 1), add=nn.Conv2d(3, 3, 1)), img(s=8)


@case(THRESHOLD, softmax(2))
def selective_kernels():
    """Two branches compete per channel (SKNet, split attention with radix 2)."""

    def forward(m, x):
        branches = torch.stack([m.small(x), m.large(x)], 1)
        z = F.relu(m.reduce(branches.sum(1).mean((-2, -1))))
        a = torch.stack([f(z) for f in m.choose], 1).softmax(dim=1)
        return (branches * a[..., None, None]).sum(1)

    convs = {"small": nn.Conv2d(3, 8, 3, padding=1), "large": nn.Conv2d(3, 8, 5, padding=2)}
    return Net(forward, reduce=nn.Linear(8, 4), choose=linears(2, 4, 8), **convs), img()
