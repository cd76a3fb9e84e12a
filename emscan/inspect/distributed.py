"""Folders of torch.distributed.checkpoint: their `.metadata` is a pickle that names tensors and the files they lie in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from emscan.inspect.document import FileInfo, TensorInfo
from emscan.inspect.files import Files
from emscan.inspect.lenient import Key, LenientMachine
from emscan.inspect.names import pickle_info
from emscan.inspect.part import Entry, Part
from emscan.inspect.reader import opened
from emscan.inspect.torchfile import read_checkpoint
from emscan.inspect.walk import attributes
from emscan.load import shards
from emscan.load.calls import DAMAGED, Global, Instance
from emscan.load.keys import DISTRIBUTED, MODEL_KEYS, TRAINING
from emscan.load.placeholders import Held
from emscan.load.source import RefusalError, printable

_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2, "uint32": 4, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


class Place(NamedTuple):
    """Where a part of a tensor lies: ``size`` bytes from ``start`` of ``file``."""

    file: Any
    start: Any
    size: Any


def read_distributed(files: Files, path: Path, folder: Path) -> Part:
    """Return the tensors that `.metadata` names. Raises RefusalError where it is no such metadata."""
    with opened(str(path)) as file:
        data = file.at(0, file.size)
        files.add(FileInfo(path.name, file.size, "pickle"), file)
    machine = LenientMachine(data)
    machine.run()
    part = Part("torch-distributed", "a torch.distributed.checkpoint folder")
    part.pickle = pickle_info(
        None, machine, safe=lambda name: name in DISTRIBUTED or name.removeprefix("torch.") in _BYTES
    )
    if part.pickle.refused:
        what = (
            f"reading its .metadata would import {part.pickle.refused[0].name}, which torch's own writer does not use"
        )
        part.refusal = RefusalError(what, "save the checkpoint again with torch.distributed.checkpoint")
    root = machine.result
    table = attributes(root).get("state_dict_metadata") if isinstance(root, Instance) else None
    if not isinstance(table, dict):
        raise RefusalError("its .metadata does not say which tensors there are", DAMAGED)
    places = _places(attributes(root).get("storage_data"))
    holders = {str(name).partition(".")[0] for name in table}
    model = next((key for key in MODEL_KEYS if key in holders), None)
    other = [str(name) for name, item in table.items() if not _add(part, str(name), item, places)]
    for entry in part.entries:
        first = entry.info.name.partition(".")[0]
        entry.weight = first == model if model is not None else not first.lower().startswith(TRAINING)
    if other:
        part.metadata["other_entries"] = other
    for name in dict.fromkeys(place.file for found in places.values() for place in found):
        _list_file(files, part, folder, name)
    if files.check and part.refusal is None:
        for entry in part.entries:
            _count(entry.info, folder, places.get(entry.info.name, []))
    return part


def _count(info: TensorInfo, folder: Path, places: list[Place]) -> None:
    """Count NaN and Inf in the parts of a tensor; each part is a torch.save file inside a file."""
    from emscan.inspect.values import count_values

    info.nan = info.inf = 0
    for place in places:
        with opened(str(shards.inside(folder, place.file, ", named by .metadata,"))) as file:
            inner = file.window(place.start, place.size)
            found = read_checkpoint(inner, place.file)
            count_values(inner, found.entries)
        info.nan += sum(entry.info.nan or 0 for entry in found.entries)
        info.inf += sum(entry.info.inf or 0 for entry in found.entries)


def _add(part: Part, name: str, item: Any, places: dict[str, list[Place]]) -> bool:
    """Add one tensor; returns whether it is one."""
    fields = attributes(item) if isinstance(item, Instance) else {}
    shape = _sizes(fields.get("size"))
    if shape is None:
        return False
    dtype = _dtype(fields.get("properties"))
    item_size = _BYTES.get(dtype or "")
    found = [place.file for place in places.get(name, [])]
    info = TensorInfo(
        name, dtype, shape, math.prod(shape) * item_size if item_size else None, found[0] if found else ""
    )
    part.entries.append(Entry(info))
    return True


def _sizes(value: Any) -> list[int] | None:
    sizes = value.arguments[0] if isinstance(value, Held) and value.kind == "torch.Size" and value.arguments else None
    if type(sizes) is not tuple or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        return None
    return list(sizes)


def _dtype(properties: Any) -> str | None:
    """Return the dtype of TensorProperties, whose state is a dict, or since torch 2.1 a tuple."""
    state = properties.state if isinstance(properties, Instance) else None
    found = state.get("dtype") if isinstance(state, dict) else state[0] if type(state) is tuple and state else None
    return found.name.removeprefix("torch.") if isinstance(found, Global) else None


def _places(table: Any) -> dict[str, list[Place]]:
    """Return tensor -> the files that hold parts of it."""
    found: dict[str, list[Place]] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(key, Key) and isinstance(key.value, Instance) and isinstance(value, Instance):
            name, fields = attributes(key.value).get("fqn"), attributes(value)
            place = Place(*(fields.get(field) for field in ("relative_path", "offset", "length")))
            if type(name) is str and type(place.file) is str and type(place.start) is type(place.size) is int:
                found.setdefault(name, []).append(place)
    return found


def _list_file(files: Files, part: Part, folder: Path, name: str) -> None:
    try:
        size = shards.inside(folder, name, ", named by .metadata,").stat().st_size
    except shards.MissingError:
        files.add(FileInfo(name, None, "missing"))
        what = f"its file {printable(name, 80)} is missing"
        part.notes.append(what)
        part.refusal = RefusalError(what, "copy the folder again")
        return
    files.add(FileInfo(name, size, "distcp"))
