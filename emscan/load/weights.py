"""Finds the module or the state_dict in what a file held, and fits a state_dict to an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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


def fit(module: nn.Module, weights: dict[str, Tensor], target: str) -> list[str]:
    """Load ``weights`` strictly into ``module``; returns notes, raises RefusalError where they do not fit."""
    stripped, notes = strip_prefixes(weights)
    wanted = module.state_dict()
    if len(weights.keys() & wanted.keys()) >= len(stripped.keys() & wanted.keys()):
        stripped, notes = weights, []
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in wanted.items() if not is_lazy(tensor)}
    clashes = [name for name, tensor in stripped.items() if shapes.get(name, tensor.shape) != tensor.shape]
    missing, unexpected, failure = [*wanted], [*stripped], ""
    try:
        result = module.load_state_dict(stripped, strict=False)
        missing, unexpected = result.missing_keys, result.unexpected_keys
    except RuntimeError as error:  # shapes that clash; the names are compared here
        missing = [name for name in wanted if name not in stripped]
        unexpected = [name for name in stripped if name not in wanted]
        failure = "" if clashes else printable(error)
    misfits = {"missing": missing, "unexpected": unexpected}
    parts = [f"{len(names)} {what} ({listing(names)})" for what, names in misfits.items() if names]
    if clashes:
        first = clashes[0]
        detail = f"{first}: {_shape(stripped[first])} in the file, {_shape(wanted[first])} in the model"
        parts.append(f"{len(clashes)} of another shape ({printable(detail)}{', ...' if len(clashes) > 1 else ''})")
    if parts or failure:
        raise RefusalError(
            f"its weights do not fit {printable(target)}: {', '.join(parts) or failure}",
            "name the architecture that they were saved from with --model",
        )
    return notes + _cast_note(stripped, wanted)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _cast_note(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    pairs = {(tensor.dtype, wanted[name].dtype) for name, tensor in weights.items() if name in wanted}
    return [f"weights were converted from {old} to {new}" for old, new in sorted(pairs, key=str) if old != new]
