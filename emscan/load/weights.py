"""Finds the module or the state_dict in what a file held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from emscan.load.keys import AVERAGES, MODEL_KEYS, SOLE_KEYS, TRAINING
from emscan.load.source import RefusalError, listing, printable

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LONGEST_NAME = 4096
_DEEPEST = 8


def find_model(value: Any) -> tuple[nn.Module | None, dict[str, Tensor], list[str]]:
    """Return the module, or else the weights by name, and notes on where they were.

    A module wrapped in DataParallel is unwrapped. Raises RefusalError where there is neither.
    """
    notes: list[str] = []
    for _ in range(_DEEPEST):  # {"model": {"state_dict": ...}}
        key = _model_key(value)
        if key is None:
            break
        notes += _choice(value, key)
        value = value[key]
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], nn.Module):
        value = value[0]
        notes.append("the model was the only item of a list")
    if isinstance(value, nn.DataParallel):
        value = value._modules.get("module")
        notes.append("unwrapped from DataParallel")
    if isinstance(value, nn.Module):
        return value, {}, notes
    if isinstance(value, Tensor):
        raise RefusalError("it holds one tensor, not a model", "pass it with --probe if it is the input")
    weights, ignored, modules = _flatten(value)
    if not weights and not isinstance(value, Mapping):
        raise RefusalError(
            f"it holds a {printable(type(value).__name__, 80)}, not a model", "save a module or its state_dict"
        )
    if ignored:
        notes.append(f"entries without weights were left out: {listing(ignored)}")
    if modules:
        notes.append(f"its modules {listing(modules)} were taken apart: how they connect is not in the file")
    if not weights:
        raise RefusalError("it holds no tensors", "save a module or its state_dict")
    return None, weights, notes


def _choice(value: Mapping[Any, Any], key: Any) -> list[str]:
    """Return notes on what was chosen, and on other weights beside it."""
    notes = [f"the model was found under {printable(repr(key), 80)}"]
    others = [str(other) for other, item in value.items() if other != key and _is_candidate(other, item)]
    if str(key) in AVERAGES:
        notes[0] += ", a moving average of the weights; the raw weights are not in the file"
    if others:
        notes.append(f"other weights beside it were left out: {listing(others)}")
    return notes


def _model_key(value: Any) -> Any:
    """Return the key under which a training checkpoint keeps its model, or None."""
    if not isinstance(value, Mapping):
        return None
    holders = [key for key, item in value.items() if _is_candidate(key, item)]
    raw = [key for key in holders if str(key) not in AVERAGES]
    found = next((key for key in MODEL_KEYS if key in raw), None)
    if found is not None:
        return found
    direct = any(isinstance(item, Tensor) and item.dim() for item in value.values())  # a step or a loss is none
    if len(raw) == 1 and (raw[0] in SOLE_KEYS or isinstance(value[raw[0]], nn.Module)) and not direct:
        return raw[0]
    if not raw and holders and not direct:
        return holders[0]
    return None


def _is_candidate(key: Any, item: Any) -> bool:
    """Whether the entry of a checkpoint holds a model or weights."""
    if is_training_state(key, item):
        return False
    if isinstance(item, nn.Module):
        return True
    return isinstance(item, Mapping | list | tuple) and bool(_flatten(item, first=True)[0])


def is_training_state(key: Any, item: Any) -> bool:
    """Whether an entry of a checkpoint belongs to the training: an optimizer, a schedule, a record."""
    optimizer = isinstance(item, Mapping) and "param_groups" in item and "state" in item
    return optimizer or str(key).lower().startswith(TRAINING)


def _flatten(value: Any, *, first: bool = False) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return the tensors of nested containers under dotted names, the names of what is none, and of modules in it.

    ``first``: the first tensor is enough.
    """
    weights: dict[str, Tensor] = {}
    ignored: list[str] = []
    modules: list[str] = []
    # Iterative, and a container is entered once: a file can nest them deeply, or one in itself.
    pending: list[tuple[str, Any]] = [("", value)]
    seen: set[int] = set()
    while pending and not (first and weights):
        name, item = pending.pop()
        if len(name) > _LONGEST_NAME:
            raise RefusalError("its dicts are nested too deep", "save a module or its state_dict")
        if isinstance(item, Tensor):
            weights[name] = item.detach()
        elif isinstance(item, nn.Module):
            modules.append(name)
            weights.update({f"{name}.{key}": tensor.detach() for key, tensor in item.state_dict().items()})
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen and not _left_out(name, item):
            seen.add(id(item))
            pending.extend(
                (f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(list(_items(item)))
            )
        else:
            ignored.append(name)
    return weights, ignored, modules


def _left_out(name: str, item: Any) -> bool:
    """Whether a container at the top level holds no weights; inside a model, names are the model's own."""
    return bool(name) and "." not in name and is_training_state(name, item)


def _items(item: Any) -> Iterable[tuple[Any, Any]]:
    return item.items() if isinstance(item, Mapping) else enumerate(item)


def strip_prefixes(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights without what data-parallel, sharded and compiled wrappers put into every name."""
    stripped = weights
    removed: list[str] = []
    while prefix := _shared(stripped):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
        removed.append(f"the prefix {prefix!r} was taken off every name")
    for wrapper in _WRAPPERS[1:]:  # never the name of a layer of one's own
        inner = {name.replace(f"{wrapper}.", ""): tensor for name, tensor in stripped.items()}
        if inner.keys() != stripped.keys() and len(inner) == len(stripped):
            stripped = inner
            removed.append(f"'{wrapper}.' was taken out of the names")
    return stripped, removed


def _shared(weights: Mapping[str, Tensor]) -> str:
    """Return the wrapper's prefix that every name has, or nothing."""
    first = next(iter(weights), "").partition(".")[0]
    prefix = f"{first}."
    return prefix if first in _WRAPPERS and all(name.startswith(prefix) for name in weights) else ""


def in_order(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """Return the tensors of a list of layers under an architecture's names, matched one by one; None where they differ.

    A list has places in place of names: that is enough where the number, the shapes and the last part of every name
    (weight, bias) are those of the architecture.
    """
    pairs = list(zip(weights.items(), wanted.items(), strict=False))
    fits = len(weights) == len(wanted) and all(
        name.partition(".")[0].isdecimal()
        and name.rpartition(".")[2] == other.rpartition(".")[2]
        and tensor.shape == getattr(like, "shape", None)
        for (name, tensor), (other, like) in pairs
    )
    if not fits:
        return None
    note = (
        f"its {len(pairs)} tensors have places in a list in place of names: they were matched in order, shape by shape"
    )
    return {other: tensor for (_, tensor), (other, _) in pairs}, [note]


_PACKED = (  # parts of tensors' names that come with weights of few bits: all of them, under one layer
    (("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
    (("weight", "weight.absmax"), "bitsandbytes, 4 bits"),
    (("weight", "SCB"), "bitsandbytes, 8 bits"),
    (("weight", "scales", "biases"), "MLX"),
    (("weight_packed", "weight_scale"), "compressed-tensors"),
    (("weight_scale_inv", "weight"), "8-bit floats in blocks"),
    (("_packed_params._packed_params", "scale", "zero_point"), "torch's own quantization"),
)


def packed(weights: Mapping[str, Tensor]) -> list[str]:
    """Return a note where the weights are quantized and packed, so that their values say nothing by themselves."""
    for parts, what in _PACKED:
        for name in weights:
            layer = name.removesuffix(parts[-1])
            if layer != name and all(layer + part in weights for part in parts):
                return [
                    f"its weights are quantized ({what}): their numbers are codes; give the model before quantization"
                ]
    return []
