"""The registry and the small parts that the hard cases share."""

from __future__ import annotations

import torch
from torch import nn

CASES: dict[str, tuple] = {}
OPEN: dict[str, list] = {}
DETACHED: set[str] = set()

TWO_WAY, THRESHOLD, SMOOTH = ("em", "logistic", 2), ("hard", "threshold", 2), ("soft", "smooth-gate", 2)


def softmax(k):
    return ("em", "softmax", k)


def kernel(k):
    return ("em", "kernel", k)


def selection(k):
    return ("hard", "selection", k)


def truncation(k):
    return ("hard", "truncation", k)


def case(*expected, objective=None, also=(), detached=False):
    """Register a builder with its rows; a count of None matches any.

    ``also``: other readings that the rules allow; ``detached``: no gradient flows through some ``em`` row, and it says so.
    """

    def register(builder):
        assert builder.__name__ not in CASES
        CASES[builder.__name__] = (builder, list(expected), objective)
        if also:
            OPEN[builder.__name__] = [list(rows) for rows in also]
        if detached:
            DETACHED.add(builder.__name__)
        return builder

    return register


class Net(nn.Module):
    """A plain function ``fn(module, x)`` or ``fn(module, x, y)`` over named layers and parameters."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x, y=None):
        return self.fn(self, x) if y is None else self.fn(self, x, y)


def heads(x, n=2):
    """(B, T, D) -> (B, n, T, D / n)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def merge(x):
    """(B, n, T, d) -> (B, T, n d)."""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Projections of 16 features to two heads around ``core(module, q, k, v)``."""

    def __init__(self, core, **parts):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.core = core
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        return self.o(merge(self.core(self, q, k, v)))


def linears(n, inside=16, outside=16):
    return nn.ModuleList(nn.Linear(inside, outside) for _ in range(n))


def vec(n=64):
    return (torch.randn(n, 16),)


def seq(n=4, t=6):
    return (torch.randn(n, t, 16),)


def img(n=4, c=3, s=16):
    return (torch.randn(n, c, s, s),)
