"""The weights in a folder: one file, or shards that an index names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from emscan.load.source import RefusalError, Source, guarded, listing, printable

if TYPE_CHECKING:
    from torch import Tensor

    from emscan.load.registry import Options

INDEX_SUFFIX = ".index.json"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_LARGEST = 1 << 28  # bytes of an index; the largest models have some megabytes
_SHARD = re.compile(r"-(\d{5,6})-of-(\d{5,6})\.")
_NO_WEIGHTS = ("adapter_", "optimizer", "scheduler", "scaler", "training_args", "rng_state", "random_states")


class MissingError(RefusalError):
    """A file that another one names is not there."""


@dataclass
class Files:
    """The files that hold the weights. ``table``: tensor -> path, as an index says, None where there is no index.

    ``index``: the name of that index. ``others``: names of files of weights that are not read.
    """

    paths: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    table: dict[str, Path] | None = None
    index: str = ""


def find(folder: Path) -> Files:
    """Return the files with the weights of a folder: an index and its shards before a single file."""
    for index, whole in zip(INDICES, _WHOLE, strict=True):
        if (folder / index).exists():
            return named(folder, Source.read(str(inside(folder, index, ""))))
        if (folder / whole).exists():
            return Files([inside(folder, whole, "")])
    present = sorted(path.name for path in folder.iterdir())
    indices = [name for name in present if name.endswith(INDEX_SUFFIX)]
    if len(indices) == 1:
        return named(folder, Source.read(str(inside(folder, indices[0], ""))))
    others = [name for name in present if name.endswith(_ENDINGS)]
    candidates = [name for name in others if not name.startswith(_NO_WEIGHTS)]
    single = [name for name in candidates if name.endswith(".safetensors")] or candidates
    readable = [name for name in single if not name.endswith((".gguf", ".h5", ".msgpack", ".onnx"))]
    if len(single) == 1 and readable:
        return Files([inside(folder, single[0], "")])
    return Files([], others)


def named(folder: Path, index: Source) -> Files:
    """Return the shards that an index names, and which tensor is in which; every one must lie in ``folder``."""
    name = Path(index.path).name
    if index.size > _LARGEST:
        raise RefusalError(f"its {printable(name, 80)} has {index.size:,} bytes", "copy or download the folder again")
    with guarded(f"its {printable(name, 80)} is malformed"):
        table = weight_map(index.data)
    paths = {shard: inside(folder, shard, f", named by {name},") for shard in dict.fromkeys(table.values())}
    return Files(list(paths.values()), [], {tensor: paths[shard] for tensor, shard in table.items()}, name)


def weight_map(data: bytes) -> dict[str, str]:
    """Return tensor -> shard as an index says; raises ValueError and its like where it is malformed."""
    content: Any = json.loads(data, object_pairs_hook=_once)
    table = content["weight_map"]
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise ValueError("weight_map names no files")
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; JSON readers differ in which of two equal names they take."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"it says {listing(twice, 1)} twice")
    return dict(pairs)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def inside(folder: Path, name: str, by: str) -> Path:
    """Return the path of a file of the folder. Links may stay in the folder, or lead to the hub cache's own store."""
    pure = PurePath(name)
    path = folder / name
    shown = printable(name, 80)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise RefusalError(f"the file {shown}{by} lies outside the folder", "weights must lie beside config.json")
    if not _exists(path):
        raise MissingError(f"the file {shown}{by} is missing", "copy or download the folder again")
    target, home = path.resolve(), folder.resolve()
    stores = [home]
    if home.parent.name == "snapshots":  # models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH
        stores.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(store) for store in stores):
        raise RefusalError(f"the file {shown}{by} is a link out of the folder", "weights must lie beside config.json")
    return path


def shard_note(path: str) -> list[str]:
    """Return a note where the name of a file says that it is one shard of several."""
    match = _SHARD.search(Path(path).name)
    if match is None or int(match[2]) < 2:
        return []
    return [f"the file is shard {int(match[1])} of {int(match[2])}: give the folder or its index to load them all"]


def read(files: Files, options: Options) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return the tensors of all files by name, the files' sha256, and notes. Raises RefusalError or UnsafeError.

    With an index, a tensor is taken from the file that the index names for it, and from no other.
    """
    weights: dict[str, Tensor] = {}
    digests: list[str] = []
    left: list[str] = []
    for path in files.paths:
        source = Source.read(str(path))
        found = _tensors(source, path.name, options)
        digests.append(source.sha256)
        del source  # its bytes would stay beside the next shard's
        taken = found if files.table is None else _assigned(found, path, files.table, files.index)
        left += [name for name in found if name not in taken]
        weights.update(taken)
    if files.table is not None:
        weights = {name: weights[name] for name in files.table}
    return (
        weights,
        digests,
        [f"tensors that {files.index} does not name were left out: {listing(left)}"] if left else [],
    )


def _assigned(found: Mapping[str, Tensor], path: Path, table: Mapping[str, Path], index: str) -> dict[str, Tensor]:
    """Return the tensors that the index puts into the file ``path``; all must be there."""
    wanted = [name for name, place in table.items() if place == path]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise RefusalError(
            f"its file {printable(path.name, 80)} lacks {listing(missing)}, which {printable(index, 80)} says it holds",
            "copy or download the folder again",
        )
    return {name: found[name] for name in wanted}


def _tensors(source: Source, name: str, options: Options) -> dict[str, Tensor]:
    from emscan.load.registry import detect, formats
    from emscan.load.weights import find_model

    try:
        candidates = [one for one in formats() if not one.folders]
        module, weights, _ = find_model(detect(source, candidates).load(source, options).value)
    except RefusalError as error:
        raise type(error)(f"its file {printable(name, 80)} does not load: {error.reason}", error.hint) from None
    if module is not None:
        raise RefusalError(f"its file {printable(name, 80)} holds a module, not weights", "give that file itself")
    return weights
