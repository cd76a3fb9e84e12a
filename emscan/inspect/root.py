"""What the outermost object of a torch file is: a module, weights, or a training checkpoint around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from emscan.inspect.lenient import plain
from emscan.inspect.walk import Named, attributes, is_module, walk
from emscan.load.calls import Instance, Tensor
from emscan.load.keys import AVERAGES, MODEL_KEYS, SOLE_KEYS, TRAINING
from emscan.load.placeholders import Held

_STEPS = ("epoch", "global_step", "step", "iteration")
_DEEPEST = 8
_MOST_KEYS = 50
_LIGHTNING = "pytorch-lightning_version"
_HYPER = ("hyper_parameters", "hparams")


@dataclass
class Root:
    """``module``: the file holds a module. ``counts``: whether a tensor is a parameter of the model."""

    module: bool
    counts: Callable[[Named], bool]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_root(value: Any) -> Root:
    """Return what the symbolic object is, chosen as the loader chooses."""
    module, prefix = _model(value)
    inside = f"{prefix}." if prefix else ""
    table = value if isinstance(value, dict) and not prefix else {}
    left_out = tuple(f"{key}." for key, item in table.items() if _holds(item) and _is_training(str(key), item))

    def counts(named: Named) -> bool:
        if not named.name.startswith(inside):
            return False
        return named.parameter if module else not named.name.startswith(left_out)

    root = Root(module, counts, _metadata(value))
    if prefix:
        root.metadata["model_under"] = prefix
    return root


def _model(value: Any) -> tuple[bool, str]:
    """Return whether the model is a module, and under which dotted name it stands."""
    path: list[str] = []
    for _ in range(_DEEPEST):
        key = _model_key(value)
        if key is None:
            break
        path.append(str(key))
        value = value[key]
    if type(value) in (list, tuple) and len(value) == 1 and is_module(value[0]):
        path.append("0")
        value = value[0]
    return is_module(value), ".".join(path)


def _model_key(value: Any) -> Any:
    """Return the key under which a training checkpoint keeps its model, or None; as the loader chooses."""
    if not isinstance(value, dict):
        return None
    holders = [key for key, item in value.items() if _is_candidate(key, item)]
    raw = [key for key in holders if str(key) not in AVERAGES]
    found = next((key for key in MODEL_KEYS if key in raw), None)
    if found is not None:
        return found
    direct = any(isinstance(item, Tensor) and item.shape for item in value.values())
    if len(raw) == 1 and (raw[0] in SOLE_KEYS or is_module(value[raw[0]])) and not direct:
        return raw[0]
    return holders[0] if not raw and holders and not direct else None


def _is_candidate(key: Any, item: Any) -> bool:
    if _is_training(str(key), item):
        return False
    return is_module(item) or (_holds(item) and bool(walk(item).tensors))


def _holds(item: Any) -> bool:
    return isinstance(item, dict | list | tuple)


def _is_training(key: str, item: Any) -> bool:
    optimizer = isinstance(item, dict) and "param_groups" in item and "state" in item
    return optimizer or key.lower().startswith(TRAINING)


def _metadata(value: Any) -> dict[str, Any]:
    """Return what a training checkpoint says about the training."""
    if not isinstance(value, dict):
        return {} if not isinstance(value, Instance) else {"class": value.kind}
    found: dict[str, Any] = {key: value[key] for key in _STEPS if plain(value.get(key, ...))}
    if type(value.get(_LIGHTNING)) is str:
        found["lightning"] = value[_LIGHTNING]
    for key in _HYPER:
        held = value.get(key)
        table = {**attributes(held), **held.items} if isinstance(held, Held) else held
        if isinstance(table, dict) and table:
            found["hyper_parameters"] = {str(name): item if plain(item) else None for name, item in table.items()}
            break
    if any(not isinstance(item, Tensor) for item in value.values()) and len(value) <= _MOST_KEYS:
        found["entries"] = [str(key) for key in value]
    return found
