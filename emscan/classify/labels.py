"""With targets: dL/dz = r - 1[y] for cross-entropy, r - y for binary cross-entropy, by automatic differentiation.

z are the scores of the run, in float64 for the gradient; r is what the run emitted, in the model's dtype. Where the
model emits scores, r is torch's own softmax or sigmoid of them in that dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emscan.classify.site import Site

_ENTRIES = 1 << 21  # scores that are looked at: a vocabulary is wide


def residual_error(site: Site, targets: Tensor) -> float | None:
    """Return the largest difference of dL/dz to r minus target; None where targets and scores do not go together.

    ``targets``: the class of every competition (negative ones, as -100, name none), or per unit a share in [0, 1].
    """
    z = site.energies.tensor
    if z is None:
        return None
    given = z if site.op in {"cross-entropy", "bce"} else site.emitted.tensor
    if given is None or given.shape != z.shape:
        return None
    with torch.inference_mode(False):
        if site.mechanism == "logistic":
            return _sides(site, z, given, targets)
        return _classes(site, z, given, targets) if site.mechanism == "softmax" and len(site.axes) == 1 else None


def _classes(site: Site, z: Tensor, given: Tensor, targets: Tensor) -> float | None:
    count = z.shape[site.axes[0]]
    y = targets.flatten()
    if targets.is_floating_point() or z.numel() != y.numel() * count:
        return None
    rows, emitted = (t.movedim(site.axes[0], -1).reshape(-1, count) for t in (z, given))
    few = max(1, _ENTRIES // count)
    rows, emitted, y = rows[:few], emitted[:few], y[:few].to(rows.device)
    named = (y >= 0) & (y < count)
    rows, emitted, y = rows[named], emitted[named], y[named]
    if not len(y):
        return None
    with torch.enable_grad():
        at = (site.sign * rows.double()).detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(at, y, reduction="sum"), at)
    r = emitted.softmax(-1) if site.op == "cross-entropy" else emitted.exp() if site.statistic == "log" else emitted
    wanted = r.double() - F.one_hot(y, count)
    return float((gradient - wanted).abs().max())


def _sides(site: Site, z: Tensor, given: Tensor, targets: Tensor) -> float | None:
    form = site.form
    if form is None or form.log_odds is None or targets.numel() != z.numel():
        return None
    y = targets.to(z.device).double().flatten()
    named = (y >= 0) & (y <= 1)
    odds = form.log_odds(z.double()).flatten()[named]
    emitted = (given.sigmoid() if site.op == "bce" else given).double().flatten()[named]
    if not len(odds):
        return None
    with torch.enable_grad():
        at = odds.detach().clone().requires_grad_(True)
        loss = F.binary_cross_entropy_with_logits(at, y[named], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
    return float((gradient - (emitted - y[named])).abs().max())
