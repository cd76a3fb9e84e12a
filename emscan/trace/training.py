"""Graphs that were taken from a model in training mode: the mode is written into their calls and cannot be changed."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from emscan.state import keeps_mode


def taken_in_training(model: nn.Module) -> bool:
    """Whether some part of ``model`` is a graph that was taken in training mode."""
    return any(module.training for module in model.modules() if keeps_mode(module))


def in_evaluation(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a call's arguments as the call would have been written in evaluation mode: no dropout, running statistics
    where there are any."""
    places = _places(func)
    if not places:
        return args, kwargs
    changed, named = list(args), dict(kwargs)
    for position, name in places:
        if name == "training" and not _has_statistics(func, args, kwargs):
            continue
        off = 0.0 if name == "dropout_p" else False
        if position < len(changed):
            changed[position] = off
        elif name in named:
            named[name] = off
    return tuple(changed), named


@functools.lru_cache(maxsize=4096)
def _places(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = func._schema.arguments if hasattr(func, "_schema") and func.namespace == "aten" else ()
    names = {"train", "training", "dropout_p"}
    return tuple((position, a.name) for position, a in enumerate(arguments) if a.name in names)


def _has_statistics(func: Any, args: Any, kwargs: Any) -> bool:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "running_mean":
            return (args[position] if position < len(args) else kwargs.get("running_mean")) is not None
    return False
