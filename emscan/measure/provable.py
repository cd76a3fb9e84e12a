"""Units that the weights alone prove dead: no input in the known range can switch them on.

Interval arithmetic for z = W x + b: the largest z is sum_j max(w_ij low_j, w_ij high_j) + b_i. Computed in float64 and
widened by the rounding that both this sum and the model's own can make, so that the claim never errs on its side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_energy(weight: Tensor, bias: Tensor | None, low: float, high: float, *, simplex: bool = False) -> Tensor:
    """Return an upper bound on every row of W x + b, (out,), float64, for x in [low, high] entry by entry.

    ``weight``: (out, in...); ``simplex``: entries are nonnegative and sum to one, so the largest weight decides.
    """
    rows = weight.detach().double().flatten(1).cpu()
    shift = bias.detach().double().cpu() if bias is not None else torch.zeros(len(rows), dtype=torch.float64)
    if simplex:
        terms = rows.amax(1, keepdim=True)
    else:
        terms = torch.maximum(_times(rows, low), _times(rows, high))
    bound = terms.sum(1) + shift
    size = terms.abs().sum(1) + shift.abs()
    if not simplex and low < 0 < high:
        size = torch.maximum(size, _times(rows.abs(), max(-low, high)).sum(1) + shift.abs())
    epsilon = torch.finfo(weight.dtype).eps if weight.dtype.is_floating_point else 2**-23
    slack = 2 * (rows.shape[1] + 2) * max(epsilon, 2**-52) * size
    return bound + slack


def _times(rows: Tensor, end: float) -> Tensor:
    product = rows * end
    return torch.where(rows == 0, torch.zeros_like(rows), product)  # 0 * inf is 0 here: a weight of 0 adds nothing


def provably_dead(
    weight: Tensor, bias: Tensor | None, low: float, high: float, threshold: float, *, simplex: bool = False
) -> list[int]:
    """Return the rows whose energy can never exceed ``threshold``, where the derivative itself is 0."""
    bound = largest_energy(weight, bias, low, high, simplex=simplex)
    return (bound <= threshold).nonzero().flatten().tolist()
