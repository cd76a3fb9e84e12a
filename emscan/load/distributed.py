"""The metadata of a torch.distributed checkpoint, read on symbols: which tensors there are, and where their parts lie.

`.metadata` is a pickle. It is never unpickled: it runs on symbols, may name torch's own record classes and nothing
else, and what it says is checked against the files beside it before anything is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from emscan.load import allowlist, shards
from emscan.load.calls import DAMAGED, Global
from emscan.load.keys import DISTRIBUTED
from emscan.load.placeholders import Held, ModernMachine
from emscan.load.source import RefusalError, UnsafeError, guarded, printable

_METADATA = "torch.distributed.checkpoint.metadata."
_MOST_PARTS = 1 << 16  # of one tensor
_OVERHEAD = 64  # bytes that torch.save puts around a part, at least


class _MetadataMachine(ModernMachine):
    """Keeps a torch.Size as the tuple that it is; refuses every name that torch's own writer does not use."""

    def name(self, name: str) -> None:
        """Push a name of the list."""
        if name not in DISTRIBUTED and name not in allowlist.dtypes():
            reason = f"reading its .metadata would import {printable(name)}, which torch's own writer does not use"
            raise UnsafeError(reason, "save the checkpoint again with torch.distributed.checkpoint")
        self.names[name] = None
        if name not in allowlist.dtypes():
            self.foreign[name] = None
        self.push(Global(name))


@dataclass
class Parts:
    """A checked checkpoint: ``metadata`` as torch's reader takes it, tensors only, by flat names.

    ``paths``: flat name -> the keys under which it was nested. ``left``: names of entries that are no tensors.
    """

    metadata: Metadata
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def parse(data: bytes, folder: Path) -> Parts:
    """Return what the metadata in ``data`` says; raises RefusalError where it does not fit the files in ``folder``."""
    machine = _MetadataMachine(data)
    machine.run()
    with guarded("its .metadata is malformed"):
        root = _record(machine.result, "Metadata")
        parts = Parts(Metadata({}, storage_data={}, storage_meta=StorageMeta()))
        plans = root.get("planner_data")
        for name, entry in root["state_dict_metadata"].items():
            if not isinstance(entry, Held) or type(name) is not str:
                raise ValueError("an entry of no known kind")
            if entry.kind != _METADATA + "TensorStorageMetadata":
                parts.left.append(name)
                continue
            parts.metadata.state_dict_metadata[name] = _tensor(entry)
            path = plans.get(name) if type(plans) is dict else None
            parts.paths[name] = tuple(str(key) for key in path) if type(path) is tuple and path else (name,)
        _places(root["storage_data"], parts, folder)
    for name, tensor in parts.metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        _check(name, tensor, parts)
    return parts


def _record(value: Any, name: str) -> dict[str, Any]:
    """Return the fields of a record of torch.distributed.checkpoint."""
    if not isinstance(value, Held) or value.kind.rpartition(".")[2] != name or type(value.state) is not dict:
        raise ValueError(f"no {name} where one belongs")
    return value.state


def _size(value: Any) -> torch.Size:
    """Return a torch.Size from the call that makes one."""
    sizes = value.arguments[0] if isinstance(value, Held) and value.kind == "torch.Size" and value.arguments else None
    if type(sizes) is not tuple or len(sizes) > 64 or not all(type(one) is int and one >= 0 for one in sizes):
        raise ValueError("a shape that is none")
    return torch.Size(sizes)


def _tensor(entry: Held) -> TensorStorageMetadata:
    fields = _record(entry, "TensorStorageMetadata")
    properties = fields["properties"]
    dtype = properties.state[0] if type(properties.state) is tuple else properties.state["dtype"]
    if not isinstance(dtype, Global) or dtype.name not in allowlist.dtypes() or type(fields["chunks"]) is not list:
        raise ValueError("a tensor of an unknown type")
    if len(fields["chunks"]) > _MOST_PARTS:
        raise ValueError("a tensor in too many parts")
    chunks = [_record(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(getattr(torch, dtype.name.removeprefix("torch."))),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _places(table: Any, parts: Parts, folder: Path) -> None:
    """Take over where the parts of the tensors lie; every file must be one of the folder, and have those bytes."""
    sizes: dict[str, int] = {}
    for key, value in table.items():
        index, info = _record(key, "MetadataIndex"), _record(value, "_StorageInfo")
        name, place = index["fqn"], index.get("offset")
        if name not in parts.metadata.state_dict_metadata:
            continue
        file, offset, length = info["relative_path"], info["offset"], info["length"]
        if (
            type(file) is not str
            or type(offset) is not int
            or type(length) is not int
            or info.get("transform_descriptors")
        ):
            raise ValueError("a part at no known place")
        if file not in sizes:
            if len(PurePath(file).parts) != 1:
                raise RefusalError(f"its part {printable(file, 80)} lies outside the folder", "copy the folder again")
            sizes[file] = shards.inside(folder, file, ", named by .metadata,").stat().st_size
        if offset < 0 or length < 0 or offset + length > sizes[file]:
            raise RefusalError(f"its part {printable(file, 80)} has fewer bytes than .metadata says", DAMAGED)
        where = MetadataIndex(name, None if place is None else _size(place))
        parts.metadata.storage_data[where] = _StorageInfo(file, offset, length)


def _check(name: str, tensor: TensorStorageMetadata, parts: Parts) -> None:
    """Require that the parts of a tensor cover it exactly, and that the files have the bytes of each."""
    held = 0
    for chunk in tensor.chunks:
        count = math.prod(chunk.sizes)
        held += count
        info = parts.metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise RefusalError(f"its .metadata does not say where {printable(name, 80)} lies", DAMAGED)
        if count * tensor.properties.dtype.itemsize > info.length - _OVERHEAD:
            raise RefusalError(f"its tensor {printable(name, 80)} has fewer bytes than its shape needs", DAMAGED)
    if held != math.prod(tensor.size) or not _apart(tensor):
        raise RefusalError(f"its parts of {printable(name, 80)} do not make up the whole", DAMAGED)


def _apart(tensor: TensorStorageMetadata) -> bool:
    """Whether the parts lie in the tensor and no two of them overlap."""
    spans = [list(zip(chunk.offsets, chunk.sizes, strict=False)) for chunk in tensor.chunks]
    rank = len(tensor.size)
    for chunk, span in zip(tensor.chunks, spans, strict=True):
        if len(chunk.offsets) != rank or len(chunk.sizes) != rank:
            return False
        if any(start + length > whole for (start, length), whole in zip(span, tensor.size, strict=True)):
            return False
    spans.sort()
    open_spans: list[
        list[tuple[int, int]]
    ] = []  # those that reach beyond where the next one begins, along the first axis
    for span in spans:
        if not rank:
            return len(spans) == 1
        open_spans = [other for other in open_spans if other[0][0] + other[0][1] > span[0][0]]
        if any(_overlap(span, other) for other in open_spans) or len(open_spans) > 4096:
            return False
        if all(length for _, length in span):
            open_spans.append(span)
    return True


def _overlap(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    return all(a < b + n and b < a + m for (a, m), (b, n) in zip(one, other, strict=True))
