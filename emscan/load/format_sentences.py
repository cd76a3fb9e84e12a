"""Folders of sentence-transformers: `modules.json` says which modules follow the transformer. No code is in them.

The package itself is not needed: its pooling, dense and normalizing modules are built here from their config.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emscan.load import huggingface, shards
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, guarded, printable

_LARGEST = 1 << 20
_MOST = 32
_PLAIN = "give the transformer's own folder to audit that part"
_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip


@dataclass
class _Reading:
    """The folder while it is read: digests of the files, and notes."""

    folder: Path
    options: Options
    digests: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fields(self, folder: Path, name: str = "config.json") -> dict[str, Any]:
        """Return the fields of a JSON file."""
        source = Source.read(str(shards.inside(folder, name, "")))
        self.digests.append(source.sha256)
        shown = printable(f"{folder.name}/{name}", 80)
        if source.size > _LARGEST:
            raise RefusalError(f"its {shown} has {source.size:,} bytes", "copy or download the folder again")
        with guarded(f"its {shown} is malformed"):
            fields = json.loads(source.data)
            if not isinstance(fields, dict):
                raise ValueError("no JSON object")
            return fields

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors of a module's folder."""
        files = shards.find(folder)
        if not files.paths:
            raise RefusalError(f"its {printable(folder.name, 80)} has no weights", "copy or download the folder again")
        weights, digests, notes = shards.read(files, self.options)
        self.digests += digests
        self.notes += notes
        return weights


class SentenceTransformers(Format):
    """A transformer with pooling, and what follows."""

    name = "sentence-transformers"
    title = "a sentence-transformers folder"
    folders = True

    def matches(self, source: Source) -> bool:
        """Whether it is the list of modules of such a folder."""
        return Path(source.path).name == "modules.json" and source.head.lstrip()[:1] == b"["

    def load(self, source: Source, options: Options) -> Content:
        """Return the model; raises RefusalError where a module is of a kind that is not known here."""
        from emscan.load.sentences import SentenceModel

        folder = source.folder or Path(source.path).parent
        reading = _Reading(folder, options, [source.sha256])
        modules: list[nn.Module] = []
        trusted = False
        for kind, path in _listed(source):
            place = shards.inside(folder, path, ", named by modules.json,") if path else folder
            if not modules:
                if kind != "Transformer":
                    raise RefusalError(f"its first module is a {kind}, not a Transformer", "audit its parts")
                module, trusted = _transformer(reading, place)
            else:
                module = _following(kind, place, reading)
            modules.append(module)
        model = SentenceModel(modules[0], modules[1:]).eval()
        digest = hashlib.sha256("".join(reading.digests).encode()).hexdigest()
        return Content(model.to(options.device), trusted, reading.notes, digest)


def _listed(source: Source) -> list[tuple[str, str]]:
    """Return kind and folder of every module."""
    if source.size > _LARGEST:
        raise RefusalError(f"its modules.json has {source.size:,} bytes", "copy or download the folder again")
    with guarded("its modules.json is malformed"):
        entries = json.loads(source.data)
        if not isinstance(entries, list) or not 0 < len(entries) <= _MOST:
            raise ValueError("no list of modules")
        listed = [(entry["type"], entry["path"]) for entry in entries]
        if not all(isinstance(kind, str) and isinstance(path, str) for kind, path in listed):
            raise ValueError("a module without type or path")
    return [(printable(kind.rpartition(".")[2], 60), path) for kind, path in listed]


def _transformer(reading: _Reading, folder: Path) -> tuple[nn.Module, bool]:
    fields = reading.fields(folder)
    fields.pop("architectures", None)  # the bare encoder, whatever was trained on top of it
    plan = huggingface.plan(fields, folder, trust=reading.options.trust, weights=True)
    module, notes, _ = huggingface.load(plan, reading.weights(folder))
    reading.notes += [*plan.notes, *notes]
    return module, plan.trusted


def _following(kind: str, folder: Path, reading: _Reading) -> nn.Module:
    """Return a module that follows the transformer."""
    from emscan.load.sentences import Normalize, Pooling

    if kind == "Pooling":
        return Pooling(_modes(reading.fields(folder)))
    if kind == "Normalize":
        return Normalize()
    if kind == "Dropout":
        return nn.Dropout()
    if kind == "Dense":
        return _dense(reading.fields(folder), reading.weights(folder))
    if kind == "LayerNorm":
        weights = {name.removeprefix("norm."): tensor for name, tensor in reading.weights(folder).items()}
        return _filled(nn.LayerNorm(weights["weight"].shape, device="meta") if "weight" in weights else None, weights)
    raise RefusalError(f"its module {kind} is not known here", _PLAIN)


def _modes(fields: dict[str, Any]) -> list[str]:
    from emscan.load.sentences import MODES

    given = fields.get("pooling_mode")
    named = given if isinstance(given, list) else [given] if isinstance(given, str) else []
    named = [*named, *(mode for name, mode in _MODES.items() if fields.get(name) is True)]
    modes = [mode for mode in MODES if mode in named]
    if not modes or any(mode not in MODES for mode in named):
        raise RefusalError("its pooling is of a kind that is not known here", _PLAIN)
    return modes


def _dense(fields: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    from emscan.load.sentences import ACTIVATIONS, Dense

    name = str(fields.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    activation = ACTIVATIONS.get(name)
    if activation is None:
        raise RefusalError(f"its Dense has the activation {printable(name, 60)}, not known here", _PLAIN)
    inner = {key.removeprefix("linear."): tensor for key, tensor in weights.items()}
    weight = inner.get("weight")
    linear = None
    if weight is not None and weight.dim() == 2:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in inner, device="meta")
    filled = _filled(linear, inner)
    assert isinstance(filled, nn.Linear)
    return Dense(filled, activation())


def _filled(module: nn.Module | None, weights: dict[str, Tensor]) -> nn.Module:
    """Return the module with its weights, which take no second place in memory."""
    if module is None:
        raise RefusalError("one of its modules lacks its weight", "copy or download the folder again")
    with guarded("the weights of one of its modules do not fit"):
        module.load_state_dict(weights, assign=True)
    return module
