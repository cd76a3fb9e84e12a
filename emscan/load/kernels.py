"""Numbers in a layer that torch's kernels take on trust: a wrong one ends the process, not the call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from emscan.load.calls import DAMAGED
from emscan.load.source import RefusalError, printable

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_MODES = {nn.LSTM: ("LSTM",), nn.GRU: ("GRU",), nn.RNN: ("RNN_TANH", "RNN_RELU")}
_NUMBERS = ("input_size", "hidden_size", "num_layers", "proj_size")
_STEPS = ("stride", "padding", "dilation", "output_padding", "_reversed_padding_repeated_twice")
_LONGEST_STEP = 2**14
_WINDOWED = ("torch.nn.modules.pooling", "torch.nn.modules.fold")
_LARGEST_WINDOW = 2**24
_FLAGS = ("bias", "bidirectional", "batch_first")


def check_kernels(layer: nn.Module) -> None:
    """Raise RefusalError where a kernel would divide by zero heads or read beyond a recurrent layer's weights."""
    if isinstance(layer, nn.MultiheadAttention):
        _check_attention(layer)
    if isinstance(layer, nn.RNNBase):
        _check_recurrent(layer)
    if isinstance(layer, nn.modules.conv._ConvNd):
        _check_numbers(layer, _STEPS, _LONGEST_STEP)
    if type(layer).__module__ in _WINDOWED:
        _check_numbers(layer, tuple(vars(layer)), _LARGEST_WINDOW)


def _check_numbers(layer: nn.Module, names: tuple[str, ...], most: int) -> None:
    """Bound the integers in attributes: with a stride beyond 15 bits torch's transposed convolutions write outside
    their memory, and pooling and folding count up to a window's size or a padding, whatever the input."""
    for name in names:
        value = vars(layer).get(name, ())
        numbers = value if type(value) in (tuple, list) else (value,)
        if any(isinstance(number, int) and abs(number) > most for number in numbers):
            raise RefusalError(f"its {type(layer).__name__} has a {name} of {printable(value, 60)}", DAMAGED)


def _check_attention(layer: nn.MultiheadAttention) -> None:
    numbers = [vars(layer).get(name) for name in ("num_heads", "head_dim", "embed_dim")]
    heads, width, total = (number if type(number) is int and number > 0 else 0 for number in numbers)
    if not heads or heads * width != total:
        raise RefusalError("its MultiheadAttention has heads that do not match its width", DAMAGED)


def _check_recurrent(layer: nn.RNNBase) -> None:
    """Require that the flat list of weights has the tensors that the layer's numbers call for."""
    state = vars(layer)
    weights, names = state.get("_flat_weights"), state.get("_flat_weights_names")
    plain = (
        all(type(state.get(name)) is int and state[name] >= 0 for name in _NUMBERS)
        and all(type(state.get(name)) is bool for name in _FLAGS)
        and state.get("mode") in _MODES.get(type(layer), ())
        and type(state.get("dropout")) in (int, float)
    )
    if not plain or type(weights) is not list or type(names) is not list or len(weights) != len(names):
        raise RefusalError(f"its {type(layer).__name__} lacks what the layer has", DAMAGED)
    parameters = state["_parameters"]
    own = all(type(name) is str and parameters.get(name) is weight for name, weight in zip(names, weights, strict=True))
    shapes = [tensor.shape if isinstance(tensor, torch.Tensor) else None for tensor in weights]
    kinds = {tensor.dtype for tensor in weights if isinstance(tensor, torch.Tensor)}
    # Compared one by one, so that a huge number of layers ends at the first weight that is not there.
    expected = _shapes(layer)
    fits = all(shape == next(expected, None) for shape in shapes) and next(expected, None) is None
    if not own or not fits or len(kinds) != 1:
        raise RefusalError(f"its {type(layer).__name__} has weights that do not match its sizes", DAMAGED)


def _shapes(layer: nn.RNNBase) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the weights in torch's order: input, recurrent, biases, projection."""
    rows = _GATES[layer.mode] * layer.hidden_size
    output = layer.proj_size or layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    for index in range(layer.num_layers):
        for _ in range(directions):
            yield rows, layer.input_size if index == 0 else output * directions
            yield rows, output
            if layer.bias:
                yield (rows,)
                yield (rows,)
            if layer.proj_size:
                yield layer.proj_size, layer.hidden_size
