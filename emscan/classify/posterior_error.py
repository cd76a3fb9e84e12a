"""How far responsibilities are from -d log Z / dE, by automatic differentiation in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_HIDDEN = -1e4  # a score below is a mask's


def posterior(scores: Tensor, axes: tuple[int, ...], sink: Tensor | None = None) -> Tensor:
    """Return dL/ds by automatic differentiation: scores s = -E, float64, any shape; L = log(sum exp(s) + sink)."""
    with torch.enable_grad():
        s = scores.detach().double().clone().requires_grad_(True)
        # relative to the largest: a row of masked scores alone (-1e38) would lose its log K
        top = s.detach().amax(axes, keepdim=True)
        partition = torch.logsumexp(s - top.where(top.isfinite(), 0.0), dim=axes)
        if sink is not None:
            partition = torch.logaddexp(partition, sink.double().log() - top.where(top.isfinite(), 0.0).sum(axes))
        kept = partition[torch.isfinite(partition)]
        (gradient,) = torch.autograd.grad(kept.sum(), s)
    return torch.nan_to_num(gradient)


def compare(
    r: Tensor, scores: Tensor, axes: tuple[int, ...], sink: Tensor | None = None, *, total: Tensor | None = None,
    some: Tensor | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Compare r with the posterior of the scores; ``some``: r are those of these alternatives, ``total`` their sum.

    Competitions without a finite energy in sight, or with one that is no number, are left out where others remain.
    """
    expected = posterior(scores, axes, sink)
    total = r.double().sum(axes) if total is None else total.double()
    if sink is not None:
        total = total + (1 - expected.sum(axes))
    seen = expected.sum(axes) > 0
    error = (total - 1).abs()[seen]
    matter = scores.double()[(expected > 1e-6) & (scores > _HIDDEN)].abs()
    reach = float(matter.max()) if matter.numel() else 0.0
    difference = (r.double() - (expected if some is None else expected[..., some])).abs()
    if bool(seen.any()) and not bool(seen.all()):
        for axis in sorted(axis % scores.dim() for axis in axes):
            seen = seen.unsqueeze(axis)
        difference = difference[seen.expand_as(difference)]
    return float(error.max()) if error.numel() else 0.0, float(difference.max()), reach
