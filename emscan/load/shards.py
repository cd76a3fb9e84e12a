"""The weights in a Hugging Face folder: one file, or shards that an index names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from emscan.load.registry import Options, detect, formats
from emscan.load.source import RefusalError, Source, guarded, printable
from emscan.load.weights import find_model

_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt")


@dataclass
class Files:
    """The files that hold the weights; ``others``: names of files of weights that are not read."""

    paths: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def find(folder: Path) -> Files:
    """Return the files with the weights of a folder: an index and its shards before a single file."""
    for index, whole in zip(_INDEX, _WHOLE, strict=True):
        if (folder / index).exists():
            return Files(_named(folder, index))
        if (folder / whole).exists():
            return Files([_inside(folder, whole, "")])
    others = sorted({path.name for pattern in _OTHERS for path in folder.glob(pattern)})
    single = [name for name in others if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if len(single) == 1:
        return Files([_inside(folder, single[0], "")])
    return Files([], others)


def _named(folder: Path, index: str) -> list[Path]:
    """Return the shards that an index names; every one must lie in the folder."""
    source = Source.read(str(_inside(folder, index, "")))
    with guarded(f"its {index} is malformed"):
        content: Any = json.loads(source.data)
        names = content["weight_map"].values()
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    return [_inside(folder, name, f", named by {index},") for name in dict.fromkeys(names)]


def _inside(folder: Path, name: str, by: str) -> Path:
    """Return the path of a file of the folder. Links may stay in the folder, or lead to the hub cache's own store."""
    pure = PurePath(name)
    path = folder / name
    shown = printable(name, 80)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise RefusalError(f"the file {shown}{by} lies outside the folder", "weights must lie beside config.json")
    if not path.exists():
        raise RefusalError(f"the file {shown}{by} is missing", "copy or download the folder again")
    target, home = path.resolve(), folder.resolve()
    stores = [home]
    if home.parent.name == "snapshots":  # models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH
        stores.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(store) for store in stores):
        raise RefusalError(f"the file {shown}{by} is a link out of the folder", "weights must lie beside config.json")
    return path


def read(files: Files, options: Options) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of all files by name, and the files' sha256. Raises RefusalError or UnsafeError."""
    weights: dict[str, Tensor] = {}
    digests = []
    for path in files.paths:
        source = Source.read(str(path))
        digests.append(source.sha256)
        for name, tensor in _tensors(source, path.name, options).items():
            if name in weights:
                raise RefusalError(f"{path.name} holds {printable(name, 80)} a second time", "save the model again")
            weights[name] = tensor
    return weights, digests


def _tensors(source: Source, name: str, options: Options) -> dict[str, Tensor]:
    try:
        content = detect(source, [one for one in formats() if one.name != "transformers"]).load(source, options)
        module, found, _ = find_model(content.value)
    except RefusalError as error:
        raise type(error)(f"its file {printable(name, 80)} does not load: {error.reason}", error.hint) from None
    if module is not None:
        raise RefusalError(f"its file {printable(name, 80)} holds a module, not weights", "give that file itself")
    return found
