"""Per-head statistics where one alternative is no key: sinks in every spelling, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan

N, L, WIDTH, HEADS = 3, 7, 16, 4
SIZE = WIDTH // HEADS


class Net(nn.Module):
    """Self-attention in which ``core`` mixes q, k, v (N, H, L, E); a sink's energy is a parameter or made of the input."""

    def __init__(self, core: Callable[..., Tensor]) -> None:
        super().__init__()
        self.core = core
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate = nn.Linear(WIDTH, HEADS)
        self.energy = nn.Parameter(torch.randn(HEADS))

    def heads(self, x: Tensor) -> list[Tensor]:
        layers = self.query, self.key, self.value
        return [layer(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) * 1.5 for layer in layers]

    def column(self) -> Tensor:
        return self.energy.view(1, -1, 1, 1).expand(N, -1, L, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.asked = x
        return self.out(self.core(self, *self.heads(x)).transpose(1, 2).flatten(-2))


def scored(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / SIZE**0.5


def hidden(q: Tensor, k: Tensor) -> Tensor:
    return scored(q, k) + torch.full((L, L), torch.finfo(q.dtype).min).triu(1)


def behind(net, q, k, v):
    joined = torch.cat([scored(q, k), net.column()], -1)
    return (joined - joined.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def behind_hidden(net, q, k, v):
    return torch.cat([hidden(q, k), net.column()], -1).softmax(-1)[..., :-1] @ v


def in_front(net, q, k, v):
    shares = torch.cat([net.column(), scored(q, k)], -1).softmax(-1)[..., 1:]
    return torch.einsum("nhqk,nhke->nhqe", shares, v)


def of_the_input(net, q, k, v):
    column = net.gate(net.asked).transpose(1, 2)[..., None]
    return torch.cat([scored(q, k), column], -1).softmax(-1)[..., :-1] @ v


def in_the_denominator(net, q, k, v):
    s = scored(q, k)
    top = torch.maximum(s.amax(-1, keepdim=True), net.column())
    e = (s - top).exp()
    return (e @ v) / (e.sum(-1, keepdim=True) + (net.column() - top).exp())


def one_more(net, q, k, v):
    e = scored(q, k).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def one_more_stabilized(net, q, k, v):
    s = scored(q, k)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return (e / ((-top).exp() + e.sum(-1, keepdim=True))) @ v


def padded(net, q, k, v):
    return F.pad(scored(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


LEARNED = {behind, behind_hidden, in_front, in_the_denominator}
SPELLINGS = [
    behind, behind_hidden, in_front, of_the_input, in_the_denominator, one_more, one_more_stabilized, padded,
]  # fmt: skip


def expected(core: Callable[..., Tensor], net: Net, x: Tensor) -> dict[str, list[float]]:
    exact = Net(core).double()
    exact.load_state_dict(net.state_dict())
    with torch.no_grad():
        q, k, v = exact.heads(x.double())
        column = exact.column() if core in LEARNED else torch.zeros(N, HEADS, L, 1, dtype=torch.float64)
        if core is of_the_input:
            column = exact.gate(x.double()).transpose(1, 2)[..., None]
        s = scored(q, k)
        if core is behind_hidden:
            s = s.masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf)
        both = torch.cat([s, column], -1)
        r = both.softmax(-1)
        h = torch.special.entr(r).sum(-1) / torch.isfinite(both).sum(-1).log()
        norm = torch.linalg.vector_norm(r[..., :L] @ v, dim=-1).mean((0, 2))
    return {
        "normalized_entropy": h.mean((0, 2)).tolist(), "first_key": r[..., 0].mean((0, 2)).tolist(),
        "diagonal": r[..., :L].diagonal(0, -2, -1).mean((0, 2)).tolist(), "output_norm": (norm / norm.mean()).tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("core", SPELLINGS, ids=lambda f: f.__name__)
def test_a_sink_is_an_alternative_and_no_key(core: Callable[..., Tensor]) -> None:
    torch.manual_seed(2)
    net, x = Net(core).eval(), torch.randn(N, L, WIDTH)
    rows = [
        row for row in emscan.audit(net, x).layers if row.alternatives is not None and row.alternatives.kind == "keys"
    ]
    assert len(rows) == 1
    assert rows[0].alternatives is not None
    assert rows[0].alternatives.count == L + 1
    spread = rows[0].responsibility
    assert spread is not None
    assert spread.heads is not None
    assert spread.competitions == N * HEADS * L
    for name, values in expected(core, net, x).items():
        assert [getattr(head, name) for head in spread.heads] == pytest.approx(values, rel=1e-4), name
