"""Integers and truth values in place of those that would come from numbers nobody knows.

They are real, in range and spread out, so that what is driven by them goes on as it would: experts are chosen evenly,
a ranking is a permutation, a winner is one of K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Make = Callable[[Tensor, dict[str, Any]], Tensor]  # the output on meta, the arguments by name -> a real one

_FALSE = frozenset("isnan isinf isneginf isposinf isclose eq logical_not signbit".split())
_ALTERNATING = frozenset("lt gt less greater logical_and logical_xor".split())
_WINNERS = frozenset(
    "max min argmax argmin topk sort argsort msort kthvalue median nanmedian mode multinomial cummax cummin aminmax".split()
)


def plausible(name: str, output: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return a real tensor for ``output``, the integers or truth values that operator ``name`` gave on meta."""
    if output.dtype == torch.bool:
        return _truths(name, output)
    if name in _WINNERS:
        return _winners(output, arguments)
    if name in {"searchsorted", "bucketize"}:
        edges = arguments.get("sorted_sequence", arguments.get("boundaries"))
        return _spread(output, edges.shape[-1] if isinstance(edges, Tensor) and edges.dim() else 1)
    if "max_pool" in name:
        source = arguments.get("self")
        return _spread(output, math.prod(source.shape[2:]) if isinstance(source, Tensor) else 1)
    return torch.ones(output.shape, dtype=output.dtype)  # a cast of numbers: a count or a duration of one goes on


def _truths(name: str, output: Tensor) -> Tensor:
    """No number is odd in any way, strict comparisons go both ways, and all else holds: it is what models assert."""
    if name in _FALSE or (name in _ALTERNATING and output.numel() == 1):  # one number that steers a branch: leave it
        return torch.zeros(output.shape, dtype=torch.bool)
    if name in _ALTERNATING:
        return (torch.arange(output.numel()) % 2 == 0).view(output.shape)
    return torch.ones(output.shape, dtype=torch.bool)


def _winners(output: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Indices along the ranked axis: different ones in one row, other ones in the next."""
    source, dim = arguments.get("self"), arguments.get("dim")
    if not isinstance(source, Tensor) or source.dim() == 0:
        return torch.zeros(output.shape, dtype=output.dtype)
    if dim is None and output.dim() != source.dim():
        return _spread(output, source.numel())
    axis = (-1 if dim is None else int(dim)) % source.dim()
    if output.dim() != source.dim():
        return _spread(output, source.shape[axis])
    size, width = source.shape[axis], output.shape[axis]
    rows = torch.arange(output.numel() // max(1, width)) * (0 if width == size else width)
    moved = (rows[:, None] + torch.arange(width)) % max(1, size)
    others = [n for d, n in enumerate(output.shape) if d != axis]
    return moved.view(*others, width).movedim(-1, axis).to(output.dtype).contiguous()


def _spread(output: Tensor, count: int) -> Tensor:
    return (torch.arange(output.numel()) % max(1, count)).view(output.shape).to(output.dtype)


def plausible_buffer(buffer: Tensor) -> Tensor:
    """Return a real tensor for an integer or boolean buffer without numbers: positions, or a triangle of truth values."""
    if buffer.dtype == torch.bool:
        square = buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2]
        truths = torch.ones(buffer.shape, dtype=torch.bool)
        return truths.tril() if square else truths
    if buffer.dim() == 0:
        return torch.zeros((), dtype=buffer.dtype)
    return torch.arange(buffer.shape[-1]).expand(buffer.shape).to(buffer.dtype).contiguous()
