"""Finds the module or the state_dict in what a file held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from emscan.load.source import RefusalError, listing, printable

_MODEL_KEYS = ("state_dict", "model_state_dict", "model")
_SOLE_KEYS = ("module", "net", "network", "params", "weights")  # could be parts of a model where others are beside them
_PREFIXES = ("module.", "_orig_mod.")
_LONGEST_NAME = 4096
_TRAINING = ("optim", "scheduler", "scaler")  # state of the training at a checkpoint's top level, no weights


def find_model(value: Any) -> tuple[nn.Module | None, dict[str, Tensor], list[str]]:
    """Return the module, or else the weights by name, and notes on where they were.

    A module wrapped in DataParallel is unwrapped. Raises RefusalError where there is neither.
    """
    notes: list[str] = []
    for _ in range(3):  # {"model": {"state_dict": ...}}
        key = _model_key(value)
        if key is None:
            break
        value = value[key]
        notes.append(f"the model was found under {key!r}")
    if isinstance(value, nn.DataParallel):
        value = value._modules.get("module")
        notes.append("unwrapped from DataParallel")
    if isinstance(value, nn.Module):
        return value, {}, notes
    if isinstance(value, Mapping):
        weights, ignored = _flatten(value)
        if ignored:
            notes.append(f"entries without weights were left out: {listing(ignored)}")
        if weights:
            return None, weights, notes
        raise RefusalError("it holds no tensors", "save a module or its state_dict")
    if isinstance(value, Tensor):
        raise RefusalError("it holds one tensor, not a model", "pass it with --probe if it is the input")
    raise RefusalError(
        f"it holds a {printable(type(value).__name__, 80)}, not a model", "save a module or its state_dict"
    )


def _model_key(value: Any) -> str | None:
    """Return the key under which a training checkpoint keeps its model, or None."""
    if not isinstance(value, Mapping):
        return None
    holders = [key for key, item in value.items() if _holds_model(item) and not _is_training_state(key)]
    keys = _MODEL_KEYS + (_SOLE_KEYS if len(holders) == 1 else ())
    return next((key for key in keys if key in holders), None)


def _holds_model(item: Any) -> bool:
    return isinstance(item, nn.Module) or (isinstance(item, Mapping) and bool(_flatten(item)[0]))


def _is_training_state(key: Any) -> bool:
    return str(key).lower().startswith(_TRAINING)


def _flatten(value: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of nested dicts under dotted names, and the names of what is no tensor."""
    weights: dict[str, Tensor] = {}
    ignored: list[str] = []
    # Iterative, and a dict is entered once: a file can nest dicts deeply, or a dict in itself.
    pending: list[tuple[str, Any]] = [(str(key), item) for key, item in reversed(list(value.items()))]
    seen: set[int] = set()
    while pending:
        name, item = pending.pop()
        if len(name) > _LONGEST_NAME:
            raise RefusalError("its dicts are nested too deep", "save a module or its state_dict")
        if isinstance(item, Tensor):
            weights[name] = item.detach()
        elif isinstance(item, Mapping) and id(item) not in seen and not _is_training_state(name):
            seen.add(id(item))
            pending.extend((f"{name}.{key}", inner) for key, inner in reversed(list(item.items())))
        else:
            ignored.append(name)
    return weights, ignored


def strip_prefixes(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights without the prefixes that data-parallel and compiled wrappers put before every name."""
    stripped = weights
    removed: list[str] = []
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in stripped)), None):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
        removed.append(f"the prefix {prefix!r} was taken off every name")
    inner = {name.replace("._orig_mod.", "."): tensor for name, tensor in stripped.items()}
    if inner.keys() != stripped.keys() and len(inner) == len(stripped):
        stripped = inner
        removed.append("'_orig_mod.' was taken out of the names")
    return stripped, removed
