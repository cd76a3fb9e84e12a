"""What is in a file or a folder, without running anything from it and without torch where it can be had without.

Headers only: the tensors' bytes stay on the disk unless their values are to be checked. Pickles run on symbols.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from emscan._version import __version__
from emscan.errors import LoadError
from emscan.inspect.advice import advise
from emscan.inspect.distributed import read_distributed
from emscan.inspect.document import Inspection, Totals
from emscan.inspect.files import Files
from emscan.inspect.folder import read_config, read_index, read_sentences
from emscan.inspect.part import Entry, Part
from emscan.load import folders, shards
from emscan.load.source import RefusalError, Source

__all__ = ["Inspection", "inspect"]


def inspect(path: str, *, check_values: bool = False) -> Inspection:
    """Return what is in the file or folder at ``path``; ``check_values``: read the tensors and count NaN and Inf.

    Raises LoadError where it cannot be read, is malformed, or is nothing that emscan knows.
    """
    files = Files(check_values)
    try:
        part = _folder(path, files) if Path(path).is_dir() else _file(path, files)
        _check_names(part.entries)
        audit = advise(path, part)
    except RefusalError as error:
        raise LoadError(f"cannot inspect {path}: {error.reason}", error.hint) from None
    return Inspection(
        tool={"name": "emscan", "version": __version__}, path=path, status=part.status, format=part.format,
        title=part.title, bytes=sum(file.bytes or 0 for file in files.listed), audit=audit, files=files.listed,
        tensors=[entry.info for entry in part.entries], totals=_totals(part.entries), metadata=part.metadata,
        modules=part.modules, pickle=part.pickle, notes=part.notes,
    )  # fmt: skip


def _file(path: str, files: Files) -> Part:
    """Return what one file holds, or the shards or the configuration that it stands for."""
    source = Source.read(path)
    place = Path(path)
    if source.head.lstrip()[:1] == b"{":
        if place.name.endswith(shards.INDEX_SUFFIX):
            return _index(place, files)
        if place.name == "config.json" or b'"model_type"' in source.head or b'"architectures"' in source.head:
            return read_config(files, place, place.name, None)
    return files.whole(place, place.name, source)


def _folder(path: str, files: Files) -> Part:
    """Return what a folder holds, by the file in it that says so."""
    folder = Path(path)
    indices = [name for name in shards.INDICES if (folder / name).exists()]
    described = any((folder / name).exists() for name in ("config.json", "modules.json", ".metadata"))
    if indices and not described:  # the loader refuses it where a shard is missing
        return _index(shards.inside(folder, indices[0], ""), files)
    try:
        source = folders.open_folder(folder, weights_only=False)
    except RefusalError as error:
        return _unsupported(error)
    found = Path(source.path)
    if found.name == "modules.json":
        return read_sentences(files, found, folder)
    if found.name == "config.json":
        return read_config(files, found, found.name, folder)
    if found.name == ".metadata":
        return read_distributed(files, found, found.parent)
    return _index(found, files) if found.name.endswith(shards.INDEX_SUFFIX) else files.whole(found, found.name)


def _index(path: Path, files: Files) -> Part:
    part = Part("sharded", "an index of shards")
    read_index(files, part, path)
    return part


def _unsupported(error: RefusalError) -> Part:
    """Return a folder of a kind that emscan knows and does not load; raises ``error`` where it is no such folder."""
    what = error.reason.removeprefix("it is ")
    if what == error.reason or what.startswith("a folder"):
        raise error
    return Part("folder", what, status="not supported", refusal=error)


def _check_names(entries: list[Entry]) -> None:
    """Require that every tensor has a name of its own, as a state_dict has."""
    twice = [name for name, count in Counter((e.info.file, e.info.name) for e in entries).items() if count > 1]
    if twice:
        raise RefusalError(f"it holds the tensor {twice[0][1]!r} twice", "copy or save it again")


def _totals(entries: list[Entry]) -> Totals:
    """Count every tensor; bytes and parameters of data that tensors share once."""
    totals = Totals(len(entries))
    seen = set()
    for entry in entries:
        info = entry.info
        dtype = info.dtype or "unknown"
        totals.dtypes[dtype] = totals.dtypes.get(dtype, 0) + 1
        if entry.same is not None and entry.same in seen:
            continue
        seen.add(entry.same)
        totals.bytes += info.bytes or 0
        totals.parameters += math.prod(info.shape) if entry.weight and info.shape is not None else 0
    return totals
