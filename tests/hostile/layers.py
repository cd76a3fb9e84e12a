"""Modules whose attributes lie: numbers, types and parts that no constructor would have let through."""

from __future__ import annotations

import copy
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from tests.hostile.corpus import networks, saved

_NUMBERS = (0, 1, 2, 3, 5, 7, 16, 100, 255, 1000, 65536, 10**6, 2**31 - 1, 2**31, 2**32, 10**9, 10**12, 2**62, 2**63 - 1, -1, -2,
            -7, -(2**31), -(2**63))  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    None, True, False, 0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("nan"), "", "same", "valid", "circular", "reflect",
    "zeros", "relu", "mean", "bilinear", "nearest", b"x", (), (1,), (2, 2), (1, 1, 1), (3, 3, 3, 3), (-1, 2), (0, 0),
    (10**9, 10**9), [2, 3], {}, {"a": 1}, 2**70, 1j, F.relu, F.softmax, F.threshold, F.glu,
)  # fmt: skip
_TABLES = ("_parameters", "_buffers", "_modules")
_SHAPES = ((), (0,), (1,), (3,), (4,), (2, 3), (4, 4), (1, 1, 1), (2, 2, 2, 2), (0, 4), (4, 0))
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.uint8,
    torch.complex64,
)


def mutant(rng: Random) -> bytes:
    """Return a checkpoint of a module with a few attributes changed, removed, added or moved."""
    network = rng.choice(_networks())
    changed = copy.deepcopy(network)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        layers = [layer for layer in changed.modules() if isinstance(layer, nn.Module)]
        _change(rng.choice(layers), rng)
    with mock.patch.object(nn.RNNBase, "__getstate__", _state):
        return saved(changed)


def _state(layer: nn.Module) -> dict[str, Any]:
    """Return the state of a recurrent layer as it is; its own method trips over what was changed."""
    return {name: value for name, value in vars(layer).items() if name != "_flat_weight_refs"}


_CACHE: list[nn.Module] = []


def _networks() -> list[nn.Module]:
    if not _CACHE:
        _CACHE.extend(networks())
    return _CACHE


def _change(layer: nn.Module, rng: Random) -> None:
    state = vars(layer)
    own = [name for name in state if not name.startswith("_") and name != "training"]
    hidden = [name for name in state if name.startswith("_") and "hooks" not in name and name not in _TABLES]
    kind = rng.randrange(10)
    if kind <= 4 and own:
        name = rng.choice(own)
        state[name] = _value(state[name], rng)
    elif kind == 5 and own + hidden:
        del state[rng.choice(own + hidden)]
    elif kind == 6 and hidden:
        state[rng.choice(hidden)] = rng.choice(_OTHERS)
    elif kind == 7:
        _tensor(state, rng)
    elif kind == 8:
        _part(layer, rng)
    elif own:
        state[rng.choice(own)] = rng.choice((*_NUMBERS, *_OTHERS))


def _value(value: Any, rng: Random) -> Any:
    """Return another value of the same type, mostly."""
    if isinstance(value, bool) or rng.random() < 0.15:
        return rng.choice((*_NUMBERS, *_OTHERS, not value if isinstance(value, bool) else True))
    if isinstance(value, int):
        return rng.choice(_NUMBERS)
    if isinstance(value, tuple | list) and value:
        items = list(value)
        items[rng.randrange(len(items))] = rng.choice(_NUMBERS)
        return type(value)(items if rng.random() < 0.8 else items * rng.choice((0, 2)))
    return rng.choice(_OTHERS)


def _tensor(state: dict[str, Any], rng: Random) -> None:
    table = state.get(rng.choice(("_parameters", "_buffers")))
    if not table:
        return
    name = rng.choice(list(table))
    old = table[name]
    new: Any = torch.ones(rng.choice(_SHAPES), dtype=rng.choice(_DTYPES))
    if isinstance(old, torch.Tensor) and rng.random() < 0.3:
        new = old.detach() * rng.choice((0.0, float("nan"), float("inf"), 1e30))
    if isinstance(old, torch.Tensor) and rng.random() < 0.2:
        new = old.detach().to(rng.choice(_DTYPES))
    if isinstance(old, torch.Tensor) and rng.random() < 0.1:
        new = torch.zeros(1).expand(rng.choice(((1000, 1000), (4, 4), (2**20,))))
    if table is state.get("_parameters"):
        new = nn.Parameter(new, requires_grad=False)
    table[name] = rng.choice((new, new, new, new, None))


def _part(layer: nn.Module, rng: Random) -> None:
    """Exchange, remove, repeat or add a part."""
    parts = layer._modules
    kind = rng.randrange(4)
    other = copy.deepcopy(rng.choice(list(rng.choice(_networks()).modules())))
    if kind == 0 and parts:
        parts[rng.choice(list(parts))] = other
    elif kind == 1 and parts:
        del parts[rng.choice(list(parts))]
    elif kind == 2 and parts:
        parts[f"x{len(parts)}"] = rng.choice(list(parts.values()))
    else:
        parts[f"y{len(parts)}"] = other
