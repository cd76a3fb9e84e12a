"""A saved file -> a model: a module, or weights without an architecture, and where they came from.

A checkpoint is untrusted input. Without ``trust`` nothing in it executes: pickles are first run on symbols
(`pickles`), then loaded by torch's restricted unpickler with an allowlist of torch's own layers (`allowlist`), and
what comes out is checked once more (`graph`). The bytes that are checked are the bytes that are loaded (`source`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emscan.errors import LoadError, UsageError
from emscan.load.fit import fit
from emscan.load.foreign import describe_folder
from emscan.load.registry import Options, detect, formats
from emscan.load.source import RefusalError, Source
from emscan.load.target import build, user_error
from emscan.load.weights import find_model, strip_prefixes
from emscan.report.document import ModelInfo
from emscan.shapeless import lacks_weights

__all__ = ["LoadedModel", "load"]


@dataclass
class LoadedModel:
    """A loaded file. ``module`` is None where the file holds only weights and no architecture was named.

    ``weights``: name -> tensor in that case, else None. ``notes`` say what was found where, and what was changed.
    """

    module: nn.Module | None
    weights: dict[str, Tensor] | None
    info: ModelInfo
    notes: list[str] = field(default_factory=list)


def load(path: str, *, model_target: str | None = None, trust: bool = False, device: str = "cpu") -> LoadedModel:
    """Load the model file or Hugging Face folder at ``path``; modules keep the mode (training or not) in which they were saved.

    ``model_target``: the architecture for weights, `package.module:callable` or `path/to/file.py:callable`.
    ``trust``: load what can run code. ``info.parameters`` counts elements. Raises LoadError where the file cannot or
    must not be loaded, UsageError for a wrong target or device, ModelError where the target's own code raises.
    """
    options = Options(trust, _device(device))
    try:
        source = _source(path)
        file_format = detect(source, formats())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = file_format.load(source, options)
        module, weights, notes = find_model(content.value)
        notes = content.notes + notes
        saved_whole = module is not None
        if module is None and model_target is None:
            weights, more = strip_prefixes(weights)
        elif module is None:
            module, more = _architecture(str(model_target), weights, options)
        elif model_target is not None:
            raise UsageError(f"{path} already holds its architecture ({type(module).__name__})", "leave --model out")
        else:
            more = []
    except RefusalError as error:
        raise LoadError(f"cannot load {path}: {error.reason}", error.hint) from None
    kind = ("-module" if saved_whole else "-state-dict") if file_format.either else ""
    info = ModelInfo(
        path, file_format.name + kind, content.sha256 or source.sha256, _count(module, weights), content.trusted,
        weights=module is None or not lacks_weights(module),
    )  # fmt: skip
    return LoadedModel(module, weights if module is None else None, info, notes + more)


def _source(path: str) -> Source:
    """Return the file at ``path``; for a folder, the file in it that says what the folder holds."""
    folder = Path(path)
    if not folder.is_dir():
        return Source.read(path)
    if not (folder / "config.json").exists():
        raise RefusalError(describe_folder(folder), "give the file inside that holds the weights")
    return dataclasses.replace(Source.read(str(folder / "config.json")), folder=folder)


def _architecture(target: str, weights: dict[str, Tensor], options: Options) -> tuple[nn.Module, list[str]]:
    """Build the architecture on its device and load the weights strictly into it."""
    module = build(target)
    try:
        notes = fit(module, weights, target)
        return module.to(options.device), notes
    except RefusalError:
        raise
    except Exception as error:  # hooks and overridden methods of the user's
        raise user_error(error, f"loading the weights into {target}") from error


def _count(module: nn.Module | None, weights: dict[str, Tensor]) -> int:
    tensors: Iterable[Tensor] = weights.values() if module is None else module.parameters()
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


def _device(name: str) -> torch.device:
    """Return the device, after making sure that a tensor can be put there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception:  # torch raises RuntimeError, AssertionError or ImportError, by device
        raise UsageError(f"--device {name} does not exist here", "try --device cpu") from None
    return device
