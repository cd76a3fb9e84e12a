"""What users' code hands over as a batch: arrays, mappings, named tuples, data classes, a collator's own objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from emscan.errors import ProbeError
from emscan.load.source import RefusalError
from emscan.probe.batch import map_tensors
from emscan.probe.files import to_tensor
from emscan.probe.signature import TARGET_NAMES, Signature
from emscan.probe.usercode import PROBE

_ARRAYS = (Tensor, np.ndarray, PackedSequence)
_OF_DATASET = 64  # samples per batch of a data set without a loader


def batched(values: Any, size: int | None) -> Any:
    """Return a loader over a data set, which by itself gives samples; whatever else it is goes through."""
    if not isinstance(values, Dataset) or isinstance(values, IterableDataset):
        return values
    try:
        # A generator of its own: iterating draws a number from the global one otherwise.
        return DataLoader(values, batch_size=size or _OF_DATASET, generator=torch.Generator())
    except Exception as error:
        raise PROBE.error(error, "reading the data set") from error


def named(value: Any, forward: Signature) -> Any:
    """Return a batch that is an object with named parts (named tuple, data class, a collator's own class) as a dict.

    Parts that are no numbers (names of files, say) and for which forward has no parameter are left out.
    """
    names = {parameter.name for parameter in forward.parameters}
    if isinstance(value, tuple) and set(getattr(value, "_fields", ())) - {*names, *TARGET_NAMES}:
        return value  # by order
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, Tensor | np.ndarray | PackedSequence | tuple | list | str | bytes | int | float | complex):
        return value
    elif not isinstance(value, Mapping):
        parts = getattr(value, "__dict__", None)
        if not isinstance(parts, dict) or not any(isinstance(item, Tensor | np.ndarray) for item in parts.values()):
            return value
        value = {name: item for name, item in parts.items() if not name.startswith("_")}
    kept = {name: _numbers(item) for name, item in value.items()}
    return {n: item for n, item in kept.items() if n in names or isinstance(item, _ARRAYS) or _holds_tensors(item)}


def _numbers(item: Any) -> Any:
    """Return a list of numbers, or of equally long lists of them, as an array; anything else as it is."""
    if not isinstance(item, list) or not item or not isinstance(item[0], list | int | float):
        return item
    try:
        array = np.asarray(item)
    except ValueError:  # of several lengths
        return item
    return array if array.dtype.kind in "biuf" else item


def _holds_tensors(item: Any) -> bool:
    found: list[Tensor] = []
    map_tensors(found.append, item)
    return bool(found)


def with_tensors(value: Any, floating: torch.dtype | None = None) -> Any:
    """Return ``value`` with NumPy arrays as tensors (``floating`` ones of that dtype), mappings as dicts."""
    if isinstance(value, np.ndarray):
        try:
            tensor = to_tensor(value)
            return tensor.to(floating) if tensor.is_floating_point() else tensor
        except RefusalError as error:
            raise ProbeError(f"an array is not usable: {error.reason}", error.hint) from None
    if isinstance(value, PackedSequence | str | bytes):
        return value
    if isinstance(value, Mapping):
        return {key: with_tensors(item, floating) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(with_tensors(item, floating) for item in value)
    if isinstance(value, list):
        return [with_tensors(item, floating) for item in value]
    return value
