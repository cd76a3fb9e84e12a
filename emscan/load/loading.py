"""Loads a file or a folder: finds its format, its model, and the architecture that it goes into."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emscan.errors import LoadError, UsageError
from emscan.load.fit import fit
from emscan.load.folders import open_folder
from emscan.load.registry import Options, detect, formats
from emscan.load.shards import shard_note
from emscan.load.source import RefusalError, Source
from emscan.load.target import MODEL, build
from emscan.load.weights import find_model, packed, strip_prefixes
from emscan.report.document import Misfit, ModelInfo
from emscan.shapeless import lacks_weights
from emscan.usercode import shown

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


def load(
    path: str, *, model_target: str | None = None, model_arguments: Mapping[str, Any] | None = None,
    trust: bool = False, partial: bool = False, device: str = "cpu",
) -> LoadedModel:  # fmt: skip
    """Load the model file or Hugging Face folder at ``path``; modules keep the mode (training or not) in which they were saved.

    ``model_target``: the architecture for weights, `package.module:callable` or `path/to/file.py:callable`, called with
    ``model_arguments``. ``partial``: weights that fill a part of it are enough.
    ``trust``: load what can run code. ``info.parameters`` counts elements. Raises LoadError where the file cannot or
    must not be loaded, UsageError for a wrong target or device, ModelError where the target's own code raises.
    """
    if model_arguments and model_target is None:
        raise UsageError("--model-arg has nothing to go to", "name the architecture with --model")
    options = Options(trust, _device(device), partial, weights_only=model_target is not None)
    try:
        source = _source(path, options)
        file_format = detect(source, formats())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = file_format.load(source, options)
        digest = content.sha256 or source.sha256
        del source  # its bytes: the tensors have theirs
        module, weights, notes = find_model(content.value)
        content.value = None
        notes = [*shard_note(path), *content.notes, *notes, *packed(weights)]
        saved_whole = module is not None
        misfit = content.misfit
        if module is None and model_target is None:
            weights, more = strip_prefixes(weights)
        elif module is None:
            module, more, misfit = _architecture(str(model_target), model_arguments, weights, options)
        elif model_target is not None:
            raise UsageError(f"{path} already holds its architecture ({type(module).__name__})", "leave --model out")
        else:
            more = []
    except RefusalError as error:
        raise LoadError(f"cannot load {path}: {error.reason}", error.hint) from None
    kind = ("-module" if saved_whole else "-state-dict") if file_format.either else ""
    info = ModelInfo(
        path, file_format.name + kind, digest, _count(module, weights), content.trusted,
        weights=module is None or not lacks_weights(module), target=model_target, arguments=shown(model_arguments),
        partial=misfit,
    )  # fmt: skip
    return LoadedModel(module, weights if module is None else None, info, notes + more)


def _source(path: str, options: Options) -> Source:
    """Return the file at ``path``; for a folder, the file in it that says what the folder holds."""
    folder = Path(path)
    return open_folder(folder, weights_only=options.weights_only) if folder.is_dir() else Source.read(path)


def _architecture(
    target: str, arguments: Mapping[str, Any] | None, weights: dict[str, Tensor], options: Options
) -> tuple[nn.Module, list[str], Misfit | None]:
    """Build the architecture on its device and load the weights into it."""
    module = build(target, arguments)
    try:
        notes, misfit = fit(module, weights, target, partial=options.partial)
        return module.to(options.device), notes, misfit
    except RefusalError:
        raise
    except Exception as error:  # hooks and overridden methods of the user's
        raise MODEL.error(error, f"loading the weights into {target}") from error


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
