"""What a model says about its inputs before it runs: dtype, device, fixed batch size, sequence-first layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def parameter_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating-point parameter, to which inputs from files are cast."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1), None)


def parameter_device(module: nn.Module) -> torch.device | None:
    """Return where the model is, None for a model without parameters and buffers."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def exported_inputs(module: nn.Module) -> list[Tensor] | None:
    """Return the example inputs that an exported program remembers (without values), None for other modules."""
    if not isinstance(module, torch.fx.GraphModule):
        return None
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    return tensors if tensors and len(tensors) == len(values) else None


def fixed_batch(module: nn.Module) -> int | None:
    """Return the number of samples that an exported program takes at a time, None where any number will do."""
    sizes = {size for tensor in exported_inputs(module) or [] if (size := fixed_size(tensor.shape[0])) is not None}
    return sizes.pop() if len(sizes) == 1 else None


def fixed_size(size: Any) -> int | None:
    """Return a static size of an exported program; a symbolic one is None."""
    return size if isinstance(size, int) else None


def sequence_first(module: nn.Module, tensors: list[Tensor]) -> bool:
    """Whether axis 0 may be time: a layer with ``batch_first=False`` and an input with time and feature axes."""
    if not any(tensor.ndim >= 3 and tensor.is_floating_point() for tensor in tensors):
        return False
    return any(getattr(layer, "batch_first", None) is False for layer in module.modules())
