"""Run recorded calls again on other numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emscan.trace.graph import Call, NotKeptError, Value, substitute


def replay(calls: Iterable[Call], known: dict[int, Tensor], dtype: torch.dtype | None) -> dict[int, Tensor]:
    """Run ``calls`` in order with ``known`` values in place of the recorded ones; returns every value made.

    All floats are brought to ``dtype`` if given. Raises NotKeptError where an operand was not kept.
    """
    made = {key: t.to(dtype) if dtype is not None and t.is_floating_point() else t for key, t in known.items()}
    for call in calls:
        if call.func is None:
            raise RuntimeError("a value that was written through a view cannot be made again")
        args = substitute(call.args, lambda leaf: operand(leaf, made, dtype))
        kwargs = substitute(call.kwargs, lambda leaf: operand(leaf, made, dtype))
        if call.in_place:
            args = (args[0].clone(), *args[1:])
        out = call.func(*args, **kwargs)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        for value, tensor in zip(call.outputs, outputs, strict=True):
            made[value.id] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return made


def operand(leaf: object, known: dict[int, Tensor], dtype: torch.dtype | None) -> object:
    """Return the number that stands for an argument of a recorded call."""
    if isinstance(leaf, torch.dtype) and dtype is not None and leaf.is_floating_point:
        return dtype
    if not isinstance(leaf, Value):
        return leaf
    if leaf.id in known:
        return known[leaf.id]
    if leaf.tensor is None:
        raise NotKeptError("an operand was not kept")
    tensor = leaf.tensor.clone()  # values of an inference-mode run cannot be saved for a gradient
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
