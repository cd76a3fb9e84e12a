"""Going through a large tensor in pieces that stay in cache, so that measuring adds little time and no memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 18  # values; a float32 scratch of this size is 1 MiB


def pieces(tensor: Tensor, kept: tuple[int, ...], size: int = PIECE) -> Iterator[Tensor]:
    """Yield slices of ``tensor`` of about ``size`` values, never cutting the axes in ``kept``."""
    if tensor.numel() <= size:
        if tensor.numel():
            yield tensor
        return
    free = [axis for axis in range(tensor.dim()) if axis not in kept and tensor.shape[axis] > 1]
    if not free:
        yield tensor
        return
    axis = max(free, key=lambda a: (tensor.stride(a), tensor.shape[a]))
    step = max(1, size * tensor.shape[axis] // tensor.numel())
    for part in tensor.split(step, axis):
        yield from [part] if step > 1 or part.numel() <= 4 * size else pieces(part, (*kept, axis), size)


class Scratch:
    """One reusable float32 buffer per device."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized float32 tensor of the shape and memory order of ``tensor``; valid until the next call.

        The same order lets element-wise kernels run straight through channels-last and transposed tensors.
        """
        count = tensor.numel()
        buffer = self._buffers.get(tensor.device)
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(max(count, PIECE), dtype=torch.float32, device=tensor.device)
            self._buffers[tensor.device] = buffer
        return buffer.as_strided(tensor.shape, _dense_strides(tensor))


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return strides without gaps or overlaps, in the order of the strides of ``tensor``."""
    strides, step = [1] * tensor.dim(), 1
    for axis in sorted(range(tensor.dim()), key=lambda a: (tensor.stride(a), -a)):
        strides[axis] = step
        step *= tensor.shape[axis]
    return tuple(strides)


def others(tensor: Tensor, unit_dims: tuple[int, ...]) -> list[int]:
    """Return the axes that are not units."""
    return [axis for axis in range(tensor.dim()) if axis not in unit_dims]


def reduce_sum(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """Sum over everything but the units; flat, float64 on the CPU (summed in float32 at least)."""
    gone = others(tensor, unit_dims)
    wide = tensor.dtype if tensor.dtype in {torch.float32, torch.float64} else torch.float32
    found = tensor.sum(gone, dtype=wide) if gone else tensor
    return found.flatten().to("cpu", torch.float64)


def reduce_max(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """Maximum over everything but the units; flat, float64 on the CPU. NaN wins."""
    gone = others(tensor, unit_dims)
    return (tensor.amax(gone) if gone else tensor).flatten().to("cpu", torch.float64)


def reduce_min(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """Minimum over everything but the units; flat, float64 on the CPU. NaN wins."""
    gone = others(tensor, unit_dims)
    return (tensor.amin(gone) if gone else tensor).flatten().to("cpu", torch.float64)
