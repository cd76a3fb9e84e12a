"""Trial runs on a few samples, which leave the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emscan import limits
from emscan.load.unsafe import foreign_code
from emscan.probe.batch import Batch, Placing, part
from emscan.state import undisturbed

TRIAL, _PART = 7, 3  # samples of a trial, and of the second run that looks whether samples mix


def run(module: nn.Module, batch: Batch, seed: int) -> Tensor | None:
    """Run the model in eval mode and return its first output tensor; what it raises goes through."""
    batch = Placing().place(batch)
    with undisturbed(module, seed), torch.inference_mode(), foreign_code(), warnings.catch_warnings(), limits.trial():
        warnings.simplefilter("ignore")
        output: Any = module(*batch.args, **batch.kwargs)
        return _first_tensor(output)


def keeps_apart(module: nn.Module, batch: Batch, seed: int, axis: int = 0) -> bool:
    """Whether the last samples of a batch give alone what they give among others, along ``axis``.

    Attention or recurrence over ``axis`` mixes them, and a sum over samples has no such axis. What the model raises
    on the whole batch goes through.
    """
    together = run(module, batch, seed)
    if together is None or together.ndim <= axis or together.shape[axis] != batch.samples:
        return False
    count = min(_PART, batch.samples)
    start = batch.samples - count
    try:
        alone = run(module, part(batch, start, count, axis), seed)
    except Exception:  # a shape that only whole batches have
        return False
    together = together.narrow(axis, start, count)
    return alone is not None and alone.shape == together.shape and _close(alone, together)


def _first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in what a model returned: tuples, dicts and dataclasses are searched in order."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        items = list(output.values())
    elif isinstance(output, list | tuple):
        items = list(output)
    else:
        items = [getattr(output, name, None) for name in getattr(output, "__dataclass_fields__", ())]
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = float(torch.finfo(a.dtype).eps) ** 0.5  # the batch size changes the order of sums
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
