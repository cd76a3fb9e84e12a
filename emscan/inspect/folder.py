"""Folders, and the JSON files that stand for one: a Hugging Face model, an index of shards, sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emscan.inspect.document import FileInfo, TensorInfo
from emscan.inspect.files import Files
from emscan.inspect.part import Entry, Part
from emscan.inspect.reader import opened
from emscan.load import shards
from emscan.load.calls import DAMAGED
from emscan.load.source import RefusalError, guarded, listing, printable

_LARGEST = 1 << 24  # bytes of a configuration
_CONFIG = (
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "num_hidden_layers",
    "hidden_size",
)
_FOLDER = "copy or download the folder again"


def read_fields(files: Files, path: Path, name: str) -> dict[str, Any]:
    """Return the object of a JSON file. Raises RefusalError where it is none."""
    with opened(str(path)) as file:
        if file.size > _LARGEST:
            raise RefusalError(f"its {printable(name, 80)} has {file.size:,} bytes", "give the file of a model")
        data = file.at(0, file.size)
        files.add(FileInfo(name, file.size, "json"), file)
    try:
        fields = json.loads(data)
    except RecursionError:
        raise RefusalError(f"its {printable(name, 80)} is nested too deep", DAMAGED) from None
    except ValueError as error:
        raise RefusalError(f"its {printable(name, 80)} is not JSON ({printable(error, 120)})", DAMAGED) from None
    if not isinstance(fields, dict | list):
        raise RefusalError(f"its {printable(name, 80)} is no JSON object", DAMAGED)
    return fields if isinstance(fields, dict) else {"": fields}


def read_config(files: Files, path: Path, name: str, folder: Path | None) -> Part:
    """Return a Hugging Face model: what its configuration says, and the weights in its folder."""
    fields = read_fields(files, path, name)
    part = Part("transformers", "a Hugging Face model" if folder else "a Hugging Face configuration", whole=True)
    part.metadata = {key: fields[key] for key in _CONFIG if fields.get(key) is not None}
    quantized = fields.get("quantization_config")
    if isinstance(quantized, dict):
        part.metadata["quantization"] = quantized.get("quant_method", "unknown")
    if fields.get("auto_map"):
        part.metadata["auto_map"] = fields["auto_map"]
    if folder is not None:
        add_weights(files, part, folder, "")
    return part


def add_weights(files: Files, part: Part, folder: Path, inner: str) -> None:
    """Add the tensors of the weights in ``folder``, whose place in the folder that was given is ``inner``."""
    for index in shards.INDICES:
        if (folder / index).exists():
            read_index(files, part, shards.inside(folder, index, ""), inner)
            return
    for path in shards.find(folder).paths:
        _take(part, files.read(path, f"{inner}{path.name}"))


def read_index(files: Files, part: Part, path: Path, inner: str = "") -> None:
    """Add the tensors that an index names, from the headers of the shards; what is missing is said."""
    with opened(str(path)) as file:
        data = file.at(0, file.size)
        files.add(FileInfo(f"{inner}{path.name}", file.size, "json"), file)
    with guarded(f"its {printable(path.name, 80)} is malformed"):
        table = shards.weight_map(data)
    missing: list[str] = []
    for shard, names in _by_shard(table).items():
        name = f"{inner}{shard}"
        try:
            place = shards.inside(path.parent, shard, f", named by {path.name},")
        except shards.MissingError:
            missing.append(shard)
            files.add(FileInfo(name, None, "missing"))
            part.entries += [Entry(TensorInfo(tensor, None, None, None, name)) for tensor in names]
            continue
        _select(part, files.read(place, name), names, shard)
    if missing:
        part.notes.append(f"{len(missing)} of {len(set(table.values()))} shards are missing: {listing(missing)}")
        part.refusal = RefusalError(f"{len(missing)} of its shards are missing ({listing(missing, 1)})", _FOLDER)


def _by_shard(table: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor, shard in table.items():
        found.setdefault(shard, []).append(tensor)
    return found


def _select(part: Part, found: Part, names: list[str], shard: str) -> None:
    """Take from a shard the tensors that the index puts there, in its order."""
    by_name = {entry.info.name: entry for entry in found.entries}
    lacking = [name for name in names if name not in by_name]
    left = len(by_name) - (len(names) - len(lacking))
    found.entries = [by_name[name] for name in names if name in by_name]
    if lacking:
        what = f"its file {printable(shard, 80)} lacks {listing(lacking)}, which the index says it holds"
        part.refusal = part.refusal or RefusalError(what, _FOLDER)
        part.notes.append(what)
    if left:
        part.notes.append(
            f"{left:,} tensors in {printable(shard, 80)} are left out: the index does not name them there"
        )
    _take(part, found)


def _take(part: Part, found: Part) -> None:
    """Add what one file of weights holds."""
    if found.whole:
        raise RefusalError(f"its files of weights hold a module ({found.format})", "give that file itself")
    part.entries += found.entries
    part.refusal = part.refusal or found.refusal
    if found.metadata and "weights" not in part.metadata:
        part.metadata["weights"] = found.metadata
    if found.pickle is not None:
        if part.pickle is None:
            part.pickle = found.pickle
        else:
            part.pickle.merge(found.pickle)
    part.notes += [note for note in found.notes if note not in part.notes]


def read_sentences(files: Files, path: Path, folder: Path) -> Part:
    """Return a sentence-transformers model: its modules in order, and the weights of each."""
    steps = read_fields(files, path, path.name).get("")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise RefusalError("its modules.json is no list of modules", DAMAGED)
    part = Part("sentence-transformers", "a sentence-transformers model", whole=True)
    part.metadata["modules"] = [str(step.get("type", "")) for step in steps]
    for step in steps:
        inner = str(step.get("path", ""))
        place = shards.inside(folder, inner, ", named by modules.json,") if inner else folder
        if (place / "config.json").exists():
            config = shards.inside(place, "config.json", "")
            fields = read_fields(files, config, f"{inner}/config.json" if inner else "config.json")
            part.metadata |= {key: fields[key] for key in _CONFIG if fields.get(key) is not None}
        if place.is_dir():
            add_weights(files, part, place, f"{inner}/" if inner else "")
    return part
