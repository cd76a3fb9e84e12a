"""Inputs of a model that carries its configuration, made from what the configuration says.

Duck-typed: ``module.config`` with fields such as ``vocab_size``, ``image_size`` or ``num_mel_bins``, sub-configurations
in fields of their own, and the names of forward's parameters. Where a configuration leaves several shapes open, they
are tried on two samples, the richest plan first: text with an image in it, then text alone.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.load.source import brief
from emscan.load.unsafe import foreign_code
from emscan.probe.batch import Batch, map_tensors
from emscan.probe.layout import parameter_device, parameter_dtype
from emscan.probe.maker import Maker, NoVariantError, Values
from emscan.probe.modalities import GROUPS, MAKERS, VARIANTS
from emscan.probe.signature import Signature, signature
from emscan.probe.trial import run
from emscan.state import undisturbed

_FEW = 2
_SAMPLES, _UNSPLIT = 64, 8
_MOST_ELEMENTS = 2**24  # of one input; fewer samples beyond
_MOST_TRIALS = 32
_MISMATCH = re.compile(r"tokens\D{0,12}(\d+)\D{1,60}?features\D{0,12}(\d+)", re.IGNORECASE)
_OF_TEXT = {
    "input_ids",
    "inputs",
    "attention_mask",
    "decoder_input_ids",
    "mm_token_type_ids",
    "bbox",
    "qformer_input_ids",
}
_COUNTED = ("image", "audio", "video")  # what placeholders among the ids stand for


@dataclass(frozen=True)
class Configured:
    """Inputs by parameter name; ``left_out``: parts of the model (image, audio) for which none fit."""

    values: Values
    samples: int
    left_out: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the inputs in words."""
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.values.items())
        without = f", without {' and '.join(self.left_out)}" if self.left_out else ""
        return f"{shapes} (from the configuration){without}"


def has_configuration(module: nn.Module) -> bool:
    """Whether the module carries a configuration and takes inputs that one describes."""
    config = getattr(module, "config", None)
    return config is not None and hasattr(config, "__dict__") and bool(_principals(signature(module)))


def configured(
    module: nn.Module, samples: int | None = None, seed: int = 0, distribution: str = "normal"
) -> Configured:
    """Return inputs of ``samples`` samples, on the module's device, floats in its dtype, the same for the same seed.

    Without a number of samples: up to 64, and up to 8 where the batch cannot be split, as some input has no sample axis.
    Raises ProbeError that names the parameters for which no value could be made, or what the model said of the first.
    """
    forward = signature(module)
    failure: Exception | None = None
    trials = 0
    for groups, variant in _plans(module, forward):
        names = {parameter.name for parameter in forward.parameters}
        maker = Maker(module, names, set(forward.required), groups, distribution, variant)
        try:
            _fit(maker, seed)
        except NoVariantError:
            continue
        except Exception as error:  # whatever a forward raises on a shape that it was not made for
            failure = failure or error
            trials += 1
            if trials >= _MOST_TRIALS:
                break
            continue
        wanted = dict.fromkeys(GROUPS[name] for name in _principals(forward))
        left = tuple(group for group in wanted if group not in groups and group in ("text", "image", "audio"))
        count = samples or _enough(maker.values)
        return Configured(_placed(maker.make(MAKERS, count, seed), module), count, left)
    raise _refusal(module, forward, failure)


def _enough(values: Values) -> int:
    """Return how many samples to make, given the values of a few."""
    if any(value.shape[0] != _FEW for value in values.values()):
        return _UNSPLIT
    largest = max(value.numel() // _FEW for value in values.values())
    return int(max(_UNSPLIT, min(_SAMPLES, _MOST_ELEMENTS // max(1, largest))))


def _refusal(module: nn.Module, forward: Signature, failure: Exception | None) -> ProbeError:
    unknown = [name for name in forward.required if name not in MAKERS]
    if unknown:
        why = f"it says nothing about {', '.join(unknown)}"
    else:
        why = f"the first try raised {brief(failure)}" if failure else "no field fits"
    names = ", ".join(forward.required or _principals(forward))
    return ProbeError(
        f"no inputs could be made from the configuration of {type(module).__name__}: {why}",
        f"give --probe FILE.safetensors with tensors for {names}",
    )


def _principals(forward: Signature) -> list[str]:
    """Return the parameters that bring data of their own."""
    names = [parameter.name for parameter in forward.parameters]
    return [name for name in names if name in GROUPS and (name != "hidden_states" or "grid_thw" in names)]


def _plans(module: nn.Module, forward: Signature) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    """Yield sets of groups and, for each group, which of its shapes, the richest set first."""
    groups = _groups(module, forward)
    always = {GROUPS[name] for name in forward.required if name in GROUPS} | ({"decoder"} & set(groups))
    for size in range(len(groups), 0, -1):
        for subset in itertools.combinations(groups, size):
            if always <= set(subset):
                ranges = [range(VARIANTS.get(group, 1)) for group in subset]
                for choice in itertools.product(*ranges):
                    yield subset, dict(zip(subset, choice, strict=True))


def _groups(module: nn.Module, forward: Signature) -> list[str]:
    """Return the groups that a whole call has: a video only where the model has no image or is made for videos."""
    names = _principals(forward)
    main = getattr(module, "main_input_name", None)
    kinds = [GROUPS[name] for name in names]
    if isinstance(main, str) and GROUPS.get(main) == "video":
        kinds = [kind for kind in kinds if kind != "image"]
    elif "image" in kinds:
        kinds = [kind for kind in kinds if kind != "video"]
    if "decoder" in kinds and len(set(kinds)) > 1 and not getattr(module.config, "is_encoder_decoder", False):
        kinds = [kind for kind in kinds if kind != "decoder"]
    return list(dict.fromkeys(kinds))


# -- fitting one plan -----------------------------------------------------------------------------------------------


def _fit(maker: Maker, seed: int) -> None:
    """Run the model on the plan's inputs; what it raises goes through. Finds how many placeholders the ids need."""
    module = maker.module
    _count_features(maker, seed)
    for _ in range(3):
        values = _placed(maker.make(MAKERS, _FEW, seed), module)
        try:
            run(module, Batch((), values, None, _FEW), seed)
            return
        except Exception as error:
            counts = _MISMATCH.search(str(error))
            kinds = [kind for kind in _COUNTED if kind in maker.groups and maker.token(kind) is not None]
            named = [kind for kind in kinds if kind in str(error).lower()] or kinds
            if counts is None or "text" not in maker.groups or not named or counts[1] == counts[2]:
                raise
            maker.tokens[named[0]] = int(counts[2]) // _FEW
    run(module, Batch((), values, None, _FEW), seed)


def _count_features(maker: Maker, seed: int) -> None:
    """Ask the model how many rows it makes of an image or audio, where it has a method for that."""
    if "text" not in maker.groups:
        return
    for group in _COUNTED:
        method = getattr(maker.module, f"get_{group}_features", None)
        if group not in maker.groups or method is None or maker.token(group) is None:
            continue
        values = _placed(maker.make(MAKERS, _FEW, seed), maker.module)
        given = {name: value for name, value in values.items() if name in _taken(method, values)}
        with undisturbed(maker.module, seed), torch.inference_mode(), foreign_code():
            output = method(**given)
        maker.tokens[group] = _rows(output) // _FEW


def _taken(method: Any, values: Values) -> set[str]:
    """Return which of the values a method takes: those it has parameters for, of a text's only what it insists on."""
    parameters = inspect.signature(method).parameters
    hidden = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())  # by a wrapper
    required = {p.name for p in parameters.values() if p.default is p.empty}
    return {name for name in values if name in required or (name not in _OF_TEXT and (hidden or name in parameters))}


def _rows(output: Any) -> int:
    """Return how many feature vectors an output holds: a tensor, a list of them, or an object with either."""
    for name in ("pooler_output", "last_hidden_state"):
        inner = getattr(output, name, None)
        if inner is not None:
            return _rows(inner)
    if isinstance(output, Tensor):
        return math.prod(output.shape[:-1])
    return sum(_rows(item) for item in output) if isinstance(output, list | tuple) else 0


def _placed(values: Values, module: nn.Module) -> Values:
    """Return the values on the module's device, floats in its dtype."""
    device, dtype = parameter_device(module), parameter_dtype(module)
    return {
        name: map_tensors(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), value)
        for name, value in values.items()
    }
