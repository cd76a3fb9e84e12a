"""The second fence: what came out of a checkpoint is made of torch's own layers, tensors and plain values only."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from emscan.load import allowlist
from emscan.load.calls import DAMAGED, HINT
from emscan.load.kernels import check_kernels
from emscan.load.source import RefusalError, UnsafeError, printable

MAX_DEPTH = 200
MAX_CALLS = 20_000
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, torch.layout)
_REFERENCES = (weakref.ReferenceType,)  # recurrent layers make them of their weights; no pickle can
_TENSORS = (torch.Tensor, nn.Parameter)


def check_graph(root: Any) -> None:
    """Raise UnsafeError where anything reachable from ``root`` could run code or is no part of a plain model."""
    functions = {id(function) for function in allowlist.functions().values()}
    seen: set[int] = set()
    pending: list[Any] = [root]
    while pending:
        item = pending.pop()
        if type(item) in _SCALARS + _REFERENCES or id(item) in seen or id(item) in functions:
            continue
        seen.add(id(item))
        pending.extend(_inside(item))
    if isinstance(root, nn.Module):
        _check_nesting(root)


def _inside(item: Any) -> Iterator[Any]:
    """Yield what ``item`` holds, after checking ``item`` itself."""
    kind = type(item)
    if kind in (list, tuple, set, frozenset):
        yield from item
    elif kind in (dict, OrderedDict):
        if kind is OrderedDict and vars(item).keys() - {"_metadata"}:
            raise UnsafeError("it sets attributes of an OrderedDict", HINT)
        yield from item.keys()
        yield from item.values()
    elif kind in _TENSORS:
        _check_tensor(item)
        yield from vars(item).values()
    elif isinstance(item, nn.Module) and kind in allowlist.layers().values():
        _check_layer(item)
        yield from vars(item).values()
    else:
        name = item.__name__ if isinstance(item, type) else f"{kind.__module__}.{kind.__qualname__}"
        raise UnsafeError(f"it holds {printable(name, 80)}, which is no layer, tensor or plain value", HINT)


def _check_tensor(tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise RefusalError("it holds a sparse or quantized tensor", "save it with dense floating-point weights")
    if tensor._backward_hooks:
        raise UnsafeError("it stores hooks on a tensor, which would run as code", HINT)


def _check_layer(layer: nn.Module) -> None:
    kind, state = type(layer), vars(layer)
    for name, value in state.items():
        if hasattr(kind, name):
            raise UnsafeError(f"its {kind.__name__} replaces {printable(name, 80)} of its class", HINT)
        if "_hooks" in name and value:
            raise UnsafeError(
                f"its {kind.__name__} carries hooks ({printable(name, 80)}), which would run as code", HINT
            )
    for table, wanted in (("_modules", nn.Module), ("_parameters", nn.Parameter), ("_buffers", torch.Tensor)):
        if type(state.get(table)) not in (dict, OrderedDict) or type(state.get("training")) is not bool:
            raise RefusalError(f"its {kind.__name__} lacks what every layer has", DAMAGED)
        for name, value in state[table].items():
            if type(name) is not str or not name or "." in name or not isinstance(value, wanted | None):
                raise RefusalError(f"its {kind.__name__} has a malformed entry in {table}", DAMAGED)
    check_kernels(layer)
    plain = [value for name, value in state.items() if name != "_modules"]
    if any(isinstance(value, nn.Module) for value in _flattened(plain)):
        raise UnsafeError(f"its {kind.__name__} holds a layer outside its list of layers", HINT)


def _flattened(values: list[Any]) -> Iterator[Any]:
    """Yield everything in nested plain containers, each container once."""
    seen: set[int] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, list | tuple | set | frozenset | dict):
            if id(value) not in seen:
                seen.add(id(value))
                pending.extend(value.values() if isinstance(value, dict) else value)
        else:
            yield value


def _check_nesting(root: nn.Module) -> None:
    """Refuse layers that contain themselves, or contain each other so often that one forward would never end."""
    calls: dict[int, int] = {}  # layer -> number of layers that one pass through it visits
    path: dict[int, None] = {}
    stack: list[tuple[nn.Module, Iterator[nn.Module]]] = []

    def enter(layer: nn.Module) -> None:
        if id(layer) in path:
            raise UnsafeError("one of its layers contains itself", HINT)
        if len(path) >= MAX_DEPTH:
            raise UnsafeError(f"its layers are nested more than {MAX_DEPTH} deep", HINT)
        path[id(layer)] = None
        stack.append((layer, iter([child for child in layer._modules.values() if child is not None])))

    enter(root)
    while stack:
        layer, children = stack[-1]
        child = next(children, None)
        if child is None:
            total = 1 + sum(calls[id(inner)] for inner in layer._modules.values() if inner is not None)
            if total > MAX_CALLS:
                raise UnsafeError(f"one pass would visit its layers more than {MAX_CALLS:,} times", HINT)
            calls[id(layer)] = total
            stack.pop()
            del path[id(layer)]
        elif id(child) not in calls:
            enter(child)
