"""Going through a large tensor in pieces that stay in cache, so that measuring adds little time and no memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 18  # values; a float32 scratch of this size is 1 MiB


def pieces(tensor: Tensor, kept: tuple[int, ...], size: int = PIECE) -> Iterator[Tensor]:
    """Yield slices of ``tensor`` of about ``size`` values, never cutting the axes in ``kept`` (not negative)."""
    for (part,) in pieces_of((tensor,), kept, size):
        yield part


def pieces_of(tensors: tuple[Tensor, ...], kept: tuple[int, ...], size: int = PIECE) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same slices of several tensors of one shape; the first one's memory order decides where to cut."""
    tensor = tensors[0]
    if tensor.numel() <= size:
        if tensor.numel():
            yield tensors
        return
    free = [axis for axis in range(tensor.dim()) if axis not in kept and tensor.shape[axis] > 1]
    if not free:
        yield tensors
        return
    axis = max(free, key=lambda a: (tensor.stride(a), tensor.shape[a]))
    length = tensor.shape[axis]
    step = max(1, size * length // tensor.numel())
    for start in range(0, length, step):
        parts = tuple(t.narrow(axis, start, min(step, length - start)) for t in tensors)
        yield from [parts] if step > 1 or parts[0].numel() <= 4 * size else pieces_of(parts, (*kept, axis), size)


class Scratch:
    """One reusable float32 buffer per device."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized float32 tensor of the shape and memory order of ``tensor``, until the next call.

        The same order lets element-wise kernels run straight through channels-last and transposed tensors.
        """
        count = tensor.numel()
        buffer = self._buffers.get(tensor.device)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
                buffer = torch.empty(max(count, PIECE), dtype=torch.float32, device=tensor.device)
            self._buffers[tensor.device] = buffer
        return buffer.as_strided(tensor.shape, _dense_strides(tensor))

    def room(self, tensor: Tensor) -> Tensor:
        """Return room for a result of the dtype of ``tensor``: the buffer for float32, else a new tensor."""
        return self.like(tensor) if tensor.dtype == torch.float32 else torch.empty_like(tensor)


FIRST, SECOND, THIRD = Scratch(), Scratch(), Scratch()  # shared: whoever writes to one is done with it when it returns


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return strides without gaps or overlaps, in the order of the strides of ``tensor``."""
    strides, step = [1] * tensor.dim(), 1
    for axis in sorted(range(tensor.dim()), key=lambda a: (tensor.stride(a), -a)):
        strides[axis] = step
        step *= tensor.shape[axis]
    return tuple(strides)


def in_any_order(tensor: Tensor) -> Tensor:
    """Return all values in one row, in the order they lie in memory where that spares a copy."""
    if tensor.stride() == _dense_strides(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.flatten()


def others(tensor: Tensor, unit_dims: tuple[int, ...]) -> list[int]:
    """Return the axes that are not units."""
    return [axis for axis in range(tensor.dim()) if axis not in unit_dims]


def unit_zeros(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """Return a float64 zero per unit, on the device and in the shape that ``summed`` gives."""
    shape = [tensor.shape[axis] for axis in range(tensor.dim()) if axis in unit_dims]
    return torch.zeros(shape, dtype=torch.float64, device=tensor.device)


def summed(tensor: Tensor, gone: list[int]) -> Tensor:
    """Sum over the axes in ``gone``, in float32 at least."""
    wide = tensor.dtype if tensor.dtype in {torch.float32, torch.float64} else torch.float32
    return tensor.sum(gone, dtype=wide) if gone else tensor


def reduce_max(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """Maximum over everything but the units; flat, float64 on the CPU. NaN wins."""
    gone = others(tensor, unit_dims)
    return (tensor.amax(gone) if gone else tensor).flatten().to("cpu", torch.float64)


def reduce_min(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """Minimum over everything but the units; flat, float64 on the CPU. NaN wins."""
    gone = others(tensor, unit_dims)
    return (tensor.amin(gone) if gone else tensor).flatten().to("cpu", torch.float64)
