"""Shapes that an input may have, derived from the first layers of a model and from the shapes of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from emscan.probe.layout import exported_inputs, fixed_size

_LENGTHS = (16, 8, 32, 10, 64, 128, 50, 100, 196, 256, 512)  # of sequences, where no position table gives one
_SIGNALS = (64, 128, 32, 16, 256, 100, 512, 1000, 1024, 4096, 16000)
_IMAGES = (32, 28, 64, 8, 16, 96, 224, 128, 48, 12, 14, 20, 24, 40, 56, 80, 112, 160, 192, 256, 299, 384, 512)
_VOLUMES = (16, 8, 32, 64, 10, 20)
_WIDE_KERNEL = 7  # stems with such kernels or strides are made for large images
_LONGEST_TABLE = 4096
_LARGEST = 2**24  # elements of one sample


@dataclass(frozen=True)
class Guess:
    """One input. ``shape``: of one sample; ``high``: integers below it, None for floats; ``axis``: of the samples."""

    shape: tuple[int, ...]
    high: int | None = None
    axis: int = 0
    origin: str = field(default="", compare=False)

    def full_shape(self, samples: int) -> tuple[int, ...]:
        """Return the shape of a tensor of ``samples`` samples."""
        return (*self.shape[: self.axis], samples, *self.shape[self.axis :])


def guesses(module: nn.Module) -> list[list[Guess]]:
    """Return the guesses for each layer that holds parameters, layers in order of definition, likeliest guess first.

    An exported program remembers its inputs: then there is one list per input, of equal shapes and different ranges.
    """
    examples = exported_inputs(module)
    if examples is not None:
        return [list(_of_example(module, example)) for example in examples]
    lengths = _lengths(module)
    found = []
    for name, layer in module.named_modules():
        parameters = list(layer.parameters(recurse=False))
        if not parameters or (isinstance(layer, nn.PReLU) and getattr(layer, "num_parameters", 0) == 1):
            continue
        origin = name or type(layer).__name__
        unique = dict.fromkeys(Guess(g.shape, g.high, g.axis, origin) for g in _of_layer(layer, lengths))
        found.append(list(unique))
    return found


def _of_layer(layer: nn.Module, lengths: list[int]) -> list[Guess]:
    """Return the guesses for one layer by its class, or by its parameters alone where its own numbers are no sizes."""
    shapes = next((make for kinds, make in _BY_CLASS if isinstance(layer, kinds)), _of_parameters)
    try:
        found = list(shapes(layer, lengths))
    except Exception:  # attributes of a file: missing, of another type, negative
        found = list(_of_parameters(layer, lengths))
    return [guess for guess in found if _plausible(guess)]


def _plausible(guess: Guess) -> bool:
    sizes = (*guess.shape, 1 if guess.high is None else guess.high)
    return all(type(size) is int and 0 < size < 2**31 for size in sizes) and math.prod(guess.shape) <= _LARGEST


def _lengths(module: nn.Module) -> list[int]:
    """Return sequence lengths to try: first the sizes of what looks like position tables."""
    weights = [getattr(layer, "weight", None) for layer in module.modules() if isinstance(layer, nn.Embedding)]
    tables = [weight.shape[0] for weight in weights if isinstance(weight, Tensor) and weight.ndim]
    found = [size for size in tables if size < max(tables)]  # the largest is the vocabulary
    for layer in module.modules():
        if isinstance(layer, torch.jit.ScriptModule) or any(isinstance(layer, kinds) for kinds, _ in _BY_CLASS):
            continue  # their matrices are weights
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if 2 <= tensor.ndim <= 4:
                found += tensor.shape[:-1]
    likely = [size for size in found if 1 < size <= _LONGEST_TABLE][:8]
    return list(dict.fromkeys([*likely, *_LENGTHS]))


def _linear(layer: nn.Linear, lengths: list[int]) -> Iterator[Guess]:
    yield from _features(layer.weight.shape[1], lengths)


def _features(width: int, lengths: list[int]) -> Iterator[Guess]:
    """Yield vectors, sequences of vectors, and images that flatten into ``width`` numbers or into patches of them."""
    yield Guess((width,))
    yield from (Guess((length, width)) for length in lengths)
    for channels in (1, 3):
        side = math.isqrt(width // channels)
        if channels * side * side == width and side > 1:
            yield Guess((channels, side, side))
            yield from (Guess((channels, size, size)) for size in _IMAGES if size > side and size % side == 0)


def _conv(layer: Any, lengths: list[int]) -> Iterator[Guess]:
    axes = len(layer.kernel_size)
    sizes = {1: _SIGNALS, 2: _IMAGES, 3: _VOLUMES}[axes]
    if axes == 2 and (max(layer.kernel_size) >= _WIDE_KERNEL or max(layer.stride) >= _WIDE_KERNEL):
        sizes = (224, *sizes)
    if axes == 1:
        sizes = (*sizes, *lengths)
    if layer.transposed:
        sizes = (8, 4, 1, *sizes)
    # What the weights say: a file's attributes may say anything.
    channels = layer.weight.shape[0] if layer.transposed else layer.weight.shape[1] * layer.groups
    yield from _grid(channels, axes, sizes)
    yield from (Guess((*[size] * axes, channels)) for size in sizes)
    if channels == 1:
        yield from (Guess((size,) * axes) for size in sizes)
        yield from (Guess((size**axes,)) for size in sizes)


def _grid(channels: int, axes: int, sizes: tuple[int, ...]) -> Iterator[Guess]:
    yield from (Guess((channels, *[size] * axes)) for size in sizes)


def _embedding(layer: nn.Embedding | nn.EmbeddingBag, lengths: list[int]) -> Iterator[Guess]:
    yield from _ids(layer.weight.shape[0], lengths)


def _ids(count: int, lengths: list[int]) -> Iterator[Guess]:
    yield from (Guess((length,), count) for length in lengths)
    yield Guess((), count)


def _sequence(width: int, batch_first: bool, lengths: list[int]) -> Iterator[Guess]:
    # A sequence-first layer may sit behind a transpose: both orders are tried, and the trial tells which mixes samples.
    for axis in (0,) if batch_first else (1, 0):
        yield from (Guess((length, width), axis=axis) for length in lengths)
    yield Guess((width,))


def _recurrent(layer: nn.RNNBase, lengths: list[int]) -> Iterator[Guess]:
    yield from _sequence(layer.input_size, layer.batch_first, lengths)


def _attention(layer: nn.MultiheadAttention, lengths: list[int]) -> Iterator[Guess]:
    yield from _sequence(layer.embed_dim, layer.batch_first, lengths)


def _cell(layer: nn.RNNCellBase, lengths: list[int]) -> Iterator[Guess]:
    yield Guess((layer.input_size,))
    yield from (Guess((length, layer.input_size)) for length in lengths)


def _bilinear(layer: nn.Bilinear, _lengths: list[int]) -> Iterator[Guess]:
    yield Guess((layer.in1_features,))
    yield Guess((layer.in2_features,))


def _norm(layer: Any, _lengths: list[int]) -> Iterator[Guess]:
    count = getattr(layer, "num_features", None) or layer.num_channels
    name_axes = {nn.BatchNorm1d: 1, nn.InstanceNorm1d: 1, nn.BatchNorm3d: 3, nn.InstanceNorm3d: 3}
    axes = next((axes for kind, axes in name_axes.items() if isinstance(layer, kind)), 2)
    if axes == 1 or isinstance(layer, nn.GroupNorm):
        yield Guess((count,))
    yield from _grid(count, axes, {1: _SIGNALS, 2: _IMAGES, 3: _VOLUMES}[axes])


def _layer_norm(layer: Any, lengths: list[int]) -> Iterator[Guess]:
    shape = tuple(layer.normalized_shape)
    yield Guess(shape)
    yield from (Guess((length, *shape)) for length in lengths)


def _of_parameters(layer: nn.Module, lengths: list[int]) -> Iterator[Guess]:
    """Guess from shapes alone: hand-written layers and TorchScript, where the class says nothing."""
    for parameter in layer.parameters(recurse=False):
        shape = tuple(parameter.shape)
        if len(shape) == 2:
            yield from _features(shape[1], lengths)
            yield from _ids(shape[0], lengths)
            yield from _features(shape[0], lengths)
        elif len(shape) in (3, 4, 5):
            yield from _grid(shape[1], len(shape) - 2, {1: _SIGNALS, 2: _IMAGES, 3: _VOLUMES}[len(shape) - 2])
            yield from _features(shape[-1], lengths)
            yield from _features(shape[-2], lengths)
        elif len(shape) == 1:
            yield from _features(shape[0], lengths)
            yield from _grid(shape[0], 2, _IMAGES)


def _of_example(module: nn.Module, example: Tensor) -> Iterator[Guess]:
    shape = tuple(_hint(size) for size in example.shape)
    if example.is_floating_point():
        yield Guess(shape[1:], origin="the exported example input")
        return
    highs = [2] if example.dtype == torch.bool else [p.shape[0] for p in module.parameters() if p.ndim == 2]
    yield from (Guess(shape[1:], high, origin="the exported example input") for high in dict.fromkeys([*highs, 2]))


def _hint(size: Any) -> int:
    fixed = fixed_size(size)
    return fixed if fixed is not None else int(size.node.hint)


_BY_CLASS: tuple[tuple[Any, Callable[[Any, list[int]], Iterator[Guess]]], ...] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _conv),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
    (nn.MultiheadAttention, _attention),
    (nn.Bilinear, _bilinear),
    ((nn.modules.batchnorm._NormBase, nn.GroupNorm), _norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
)
