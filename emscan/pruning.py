"""Masks for `torch.nn.utils.prune` that take out units which do nothing: dead on the probe, or on any input.

A mask is written only where it was seen to change nothing: the model is run with it on the probe, and its outputs must
be what they were. A unit that is stuck at a constant other than 0, or whose constant a later normalization makes use
of, is left out for that reason, and so is what a report cannot place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from emscan.errors import LoadError, UsageError
from emscan.probe import Batch, Probe
from emscan.probe.batch import map_tensors
from emscan.report.document import Layer, Report
from emscan.state import undisturbed

_GATES = ("threshold",)  # a unit whose gate is shut hands on a constant
_PARAMETERS = ("weight", "bias")
_TOLERANCE = 16.0  # epsilons of the dtype, relative to the largest output: what another order of sums explains
_NEAR = 2  # rows between a layer and the normalization that may follow it


@dataclass
class Masks:
    """``masks``: parameter name -> mask of its shape, 0 where pruned. ``units``: layer -> the rows that are.

    ``left``: layer -> why its dead units are not in the masks.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, list[int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def masks(model: nn.Module, report: Report, probe: Probe, *, batches: int = 8) -> Masks:
    """Return masks for the dead and provably dead units of a report, each verified on up to ``batches`` of the probe.

    The model is returned as it was. Layers are tried one after the other, so one that cannot be pruned does not keep
    the others from it.
    """
    found = Masks()
    with undisturbed(model, report.probe.seed or 0), torch.no_grad():
        samples = [_copied(batch) for batch in islice(probe, batches)]
        expected = [_outputs(model, batch) for batch in samples]
        for layer, units in _candidates(report, found):
            tried = _try_layer(model, report, layer, units, samples, expected)
            if tried is None:
                found.left[layer.name] = "without them the outputs are others"
            elif not tried:
                found.left[layer.name] = "its weights are not found"
            else:
                for name, mask in tried.items():
                    found.masks[name] = found.masks[name] * mask if name in found.masks else mask
                found.units[layer.name] = units
    return found


def write(path: Path, found: Masks, report: Report) -> None:
    """Write masks as .safetensors, with model, probe and units as metadata."""
    about = {"format": "emscan-masks", "version": "1", "model": report.model.path or "", "probe": report.probe.source}
    about |= {"sha256": report.model.sha256 or "", "units": json.dumps(found.units)}
    try:
        save_file({name: mask.cpu().contiguous() for name, mask in found.masks.items()}, path, about)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot write {path}: {error}", "name another file") from None


def apply(model: nn.Module, path: str | Path) -> list[str]:
    """Prune a model by a file of masks, with `torch.nn.utils.prune.custom_from_mask`; return the parameters' names.

    `torch.nn.utils.prune.remove` makes it lasting. Raises LoadError for a file that is none or does not fit, before
    anything is pruned.
    """
    try:
        with safe_open(path, framework="pt") as file:
            loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # safetensors has errors of its own
        raise LoadError(
            f"cannot load {path}: {error}", "write it with `emscan audit MODEL --prune-file FILE`"
        ) from None
    places = {}
    for name, mask in loaded.items():
        place, _, parameter = name.rpartition(".")
        try:
            held = model.get_submodule(place).get_parameter(parameter)
        except AttributeError:
            raise LoadError(f"{path}: the model has no parameter {name}", "use the masks of this model") from None
        if held.shape != mask.shape:
            said = f"{tuple(mask.shape)}, the parameter is {tuple(held.shape)}"
            raise LoadError(f"{path}: the mask of {name} is {said}", "use the masks of this model")
        places[name] = model.get_submodule(place), parameter, mask.to(held.device)
    for module, parameter, mask in places.values():
        prune.custom_from_mask(module, parameter, mask)
    return list(places)


def _candidates(report: Report, found: Masks) -> Iterator[tuple[Layer, list[int]]]:
    """Yield the layers with units to take out; why the others stay goes to ``found.left``."""
    for layer in report.layers:
        parts = layer.components
        if parts is None or not (parts.dead or parts.provably_dead):
            continue
        stuck = {unit for unit, at in zip(parts.dead, parts.stuck_at or (), strict=False) if at}
        units = sorted({*parts.dead, *parts.provably_dead} - stuck)
        if stuck:
            found.left[layer.name] = f"{len(stuck)} of its units are stuck at a constant other than 0"
        if not units:
            continue
        if parts.kind != "units" or layer.mechanism not in _GATES or parts.numeric:
            found.left[layer.name] = f"its {parts.kind} are no units of a hard gate"
        else:
            yield layer, units


def _try_layer(
    model: nn.Module, report: Report, layer: Layer, units: list[int], samples: list[Batch], expected: list[list[Tensor]]
) -> dict[str, Tensor] | None:
    """Return masks of a layer's own parameters, or of those and a normalization's after it; None where outputs change."""
    own = _masks_of(model, layer.name, units, layer.components.count if layer.components is not None else 0)
    if not own:
        return {}
    if _same(model, own, samples, expected):
        return own
    for other in report.layers:
        if other.mechanism == "normalization" and abs(other.index - layer.index) <= _NEAR:
            count = layer.components.count if layer.components is not None else 0
            both = own | _masks_of(model, other.name, units, count)
            if len(both) > len(own) and _same(model, both, samples, expected):
                return both
    return None


def _masks_of(model: nn.Module, name: str, units: list[int], count: int) -> dict[str, Tensor]:
    """Return masks of weight and bias of a module that have a row for every unit."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return {}
    made = {}
    for parameter in _PARAMETERS:
        held = getattr(module, parameter, None)
        if isinstance(held, nn.Parameter) and held.dim() and held.shape[0] == count:
            mask = torch.ones_like(held, requires_grad=False)
            mask[units] = 0
            made[f"{name}.{parameter}" if name else parameter] = mask
    return made


def _same(
    model: nn.Module, tried: Mapping[str, Tensor], samples: list[Batch], expected: list[list[Tensor]]
) -> bool:  # fmt: skip
    """Whether the outputs with masked parameters are what they were. The parameters get their values back."""
    parameters = {name: model.get_parameter(name) for name in tried}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.mul_(tried[name])
        return all(
            _close(now, before)
            for batch, old in zip(samples, expected, strict=True)
            for now, before in zip(_outputs(model, batch), old, strict=True)
        )
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


def _close(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or not now.dtype.is_floating_point:
        return torch.equal(now, before)
    scale = before.abs().amax().item() if before.numel() else 0.0
    slack = _TOLERANCE * torch.finfo(now.dtype).eps * scale
    return torch.allclose(now, before, rtol=0.0, atol=slack, equal_nan=True)


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    given: Any = _copied(batch)
    torch.manual_seed(0)  # what is random in a model has to be the same both times
    map_tensors(found.append, _plain(model(*given.args, **given.kwargs)))
    return [tensor.detach().clone() for tensor in found]


def _plain(value: Any) -> Any:
    """Return an output with the containers of transformers, which are dicts, as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _copied(batch: Batch) -> Batch:
    args, kwargs = map_tensors(torch.clone, (batch.args, batch.kwargs))
    return Batch(args, kwargs, batch.targets, batch.samples)
