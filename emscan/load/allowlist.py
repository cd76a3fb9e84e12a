"""What a checkpoint may name: torch's own layer classes, the pure functions that they store, and plain helpers.

Nothing here is ever called with the file's arguments, except the short table in `calls`. torch is imported on first
use: what names only tensors can be checked without it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Element-wise functions and normalizations that layers keep as an attribute (`TransformerEncoderLayer.activation`).
_FUNCTIONS = (
    "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid mish relu relu6 rrelu selu "
    "sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold"
).split()

ITEM_SIZES = {
    "torch.BFloat16Storage": 2,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.IntStorage": 4,
    "torch.LongStorage": 8,
    "torch.ShortStorage": 2,
    "torch.storage.UntypedStorage": 1,
}


@functools.cache
def layers() -> dict[str, type[nn.Module]]:
    """Return torch's own layer classes by the name that a pickle gives them; lazy ones have no weights yet."""
    from torch import nn

    found: dict[str, type[nn.Module]] = {}
    for entry in pkgutil.iter_modules(nn.modules.__path__, nn.modules.__name__ + "."):
        for value in vars(importlib.import_module(entry.name)).values():
            if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == entry.name:
                found[f"{value.__module__}.{value.__qualname__}"] = value
    wrapper = nn.DataParallel
    found[f"{wrapper.__module__}.{wrapper.__qualname__}"] = wrapper
    return {name: kind for name, kind in found.items() if "Lazy" not in name}


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Return the pure functions that layers store, by the name that a pickle gives them."""
    from torch.nn import functional

    table = [getattr(functional, name) for name in _FUNCTIONS]
    return {f"{function.__module__}.{function.__qualname__}": function for function in table}


@functools.cache
def dtypes() -> dict[str, int]:
    """Return the bytes per element of every dtype with a whole number of bytes, by its pickled name."""
    import torch

    return {str(value): value.itemsize for value in vars(torch).values() if isinstance(value, torch.dtype)}


def torch_safe_globals(names: Iterable[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return the layers and functions among ``names`` as `torch.serialization.safe_globals` takes them.

    Only those that a file names: torch goes through the whole list at every object. The rest torch knows itself.
    """
    table: dict[str, Callable[..., Any]] = {**layers(), **functions()}
    return [(table[name], name) for name in names if name in table]
