"""Tensors of the same units in every memory layout that a model hands out."""

from __future__ import annotations

import torch
from torch import Tensor

# name -> (tensor, the axis of its 12 units)
LAYOUTS = {
    "linear": lambda: (torch.randn(70, 12), 1),
    "tokens": lambda: (torch.randn(5, 14, 12), 2),
    "convolution": lambda: (torch.randn(4, 12, 6, 5), 1),
    "channels last": lambda: (torch.randn(4, 12, 6, 5).to(memory_format=torch.channels_last), 1),
    "transposed": lambda: (torch.randn(12, 70).T, 1),
    "sequence first": lambda: (torch.randn(5, 14, 12).transpose(0, 1), 2),
    "sliced": lambda: (torch.randn(70, 40)[:, 3:27:2], 1),
    "expanded": lambda: (torch.randn(12, 1).expand(12, 9), 0),
    "units first": lambda: (torch.randn(12, 30), 0),
    "one value each": lambda: (torch.randn(12), 0),
}


def by_unit(tensor: Tensor, axis: int) -> Tensor:
    """Return (units, values) in float64."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1).double()
