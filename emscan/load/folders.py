"""What a folder holds, and which file in it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emscan.load import shards
from emscan.load.source import RefusalError, Source, listing, printable

_LARGEST = 1 << 24
_FILE = "give the file inside that holds the weights"
_TORCH = "save the model with PyTorch (model.save_pretrained or torch.save)"
# A file that stands for a kind of folder: what it is, and what to do.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("saved_model.pb", "a TensorFlow SavedModel", _TORCH),
    ("tf_model.h5", "a folder with TensorFlow weights only", _TORCH + " in place of TensorFlow"),
    ("flax_model.msgpack", "a folder with Flax weights only", _TORCH + " in place of Flax"),
    ("model.pdparams", "a PaddlePaddle model", _TORCH),
    ("inference.pdiparams", "a PaddlePaddle model", _TORCH),
    ("openvino_model.xml", "an OpenVINO model", _TORCH),
    ("Manifest.json", "a Core ML package", _TORCH),
    ("MLmodel", "an MLflow model", "give its data/model.pth"),
    ("model.onnx", "a folder with an ONNX model", _TORCH),
)


def open_folder(folder: Path, *, weights_only: bool) -> Source:
    """Return the file that says what the folder holds; raises RefusalError where it is nothing that emscan loads.

    ``weights_only``: the architecture is known from elsewhere, so that weights count more than a configuration.
    """
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise RefusalError(f"the folder cannot be read ({error.strerror})", "check the rights of the folder") from None
    if "model_index.json" in present:
        parts = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / "config.json").exists()]
        hint = f"give the folder of one part ({listing(parts, 8)})" if parts else _FILE
        raise RefusalError("it is a diffusers pipeline of several models", hint)
    if "adapter_config.json" in present and "config.json" not in present:
        raise RefusalError(_adapter(folder), "merge it into its base model (merge_and_unload) and save the result")
    if "modules.json" in present and not weights_only:
        return Source.read(str(shards.inside(folder, "modules.json", "")), folder)
    if "config.json" in present and not (weights_only and _has_weights(folder)):
        config = Source.read(str(shards.inside(folder, "config.json", "")), folder)
        if _names_architecture(config) or not _has_weights(folder):
            return config
    return _weights(folder, present)


def _weights(folder: Path, present: set[str]) -> Source:
    """Return the file of weights, the index of their shards, or the metadata of a distributed checkpoint."""
    if ".metadata" in present:
        return Source.read(str(shards.inside(folder, ".metadata", "")), folder)
    nested = [path for path in sorted(folder.iterdir()) if path.is_dir() and (path / ".metadata").exists()]
    models = [path for path in nested if "optim" not in path.name.lower()]
    if len(models) == 1:  # pytorch_model_fsdp_0/ of accelerate and Trainer
        shards.inside(folder, models[0].name, "")
        return Source.read(str(shards.inside(models[0], ".metadata", "")), models[0])
    files = shards.find(folder)
    if files.index:
        return Source.read(str(folder / files.index))
    if files.paths:
        return Source.read(str(files.paths[0]))
    raise RefusalError(*_described(folder, present, files.others))


def _described(folder: Path, present: set[str], others: list[str]) -> tuple[str, str]:
    """Return what a folder is that is not loaded, and what to do."""
    zero = [name for name in present if name.startswith("global_step") and (folder / name).is_dir()]
    states = [name for name in present if name.endswith(("_model_states.pt", "_optim_states.pt"))]
    if zero or states or "zero_to_fp32.py" in present:
        return "it is a DeepSpeed checkpoint", "join its parts with DeepSpeed's zero_to_fp32.py and give the result"
    if any(name.endswith(".distcp") for name in present):
        return "its parts (*.distcp) lack the .metadata beside them", "copy the folder again"
    for name, what, hint in _KNOWN:
        if name in present:
            return f"it is {what}", hint
    if len(others) > 1:
        return f"it is a folder with {len(others)} files of weights ({listing(others)})", "give one of them"
    inner = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / "config.json").exists()]
    if inner:
        return "it is a folder of folders", f"give one of them ({listing(inner)})"
    return "it is a folder", _FILE


def _adapter(folder: Path) -> str:
    fields = _fields(folder / "adapter_config.json")
    base = fields.get("base_model_name_or_path")
    kind = printable(fields.get("peft_type", "PEFT"), 40)
    return f"it is an adapter ({kind}) to {printable(base, 80) if base else 'a base model'}, not a model"


def _names_architecture(config: Source) -> bool:
    """Whether a config.json is one of transformers, or broken, which its own format says better."""
    fields = _fields(Path(config.path))
    return not fields or bool({"model_type", "architectures", "auto_map"} & fields.keys())


def _has_weights(folder: Path) -> bool:
    return bool(shards.find(folder).paths)


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields of a small JSON file; none where it is not one."""
    try:
        source = Source.read(str(path))
        fields = json.loads(source.data) if source.size <= _LARGEST else None
    except (ValueError, RecursionError, RefusalError):
        return {}
    return fields if isinstance(fields, dict) else {}
