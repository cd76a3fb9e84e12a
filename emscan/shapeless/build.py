"""Models without numbers: building one without allocating it, and running one that has its weights on meta."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emscan.shapeless.mode import MOST_WHILE_BUILDING, ShapelessMode
from emscan.shapeless.plausible import plausible_buffer
from emscan.shapeless.special import MOST
from emscan.shapeless.tensors import is_meta, masked, placed, unmasked

_MOST_PARTS = 150_000  # modules and parameters of a model that is built: a configuration can ask for any number


class TooManyPartsError(Exception):
    """A configuration asks for more modules and parameters than any model has."""


@contextmanager
def blueprint() -> Iterator[None]:
    """Build models in the body without allocating their weights; hand what comes out to `without_weights`.

    Small tensors and integers are real while the model is built, so buffers are computed as they are for any model.
    Raises TooManyPartsError.
    """
    parts = 0

    def count(*_: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > _MOST_PARTS:
            raise TooManyPartsError(f"it asks for more than {_MOST_PARTS:,} modules and parameters")

    hooks = [
        nn.modules.module.register_module_module_registration_hook(count),
        nn.modules.module.register_module_parameter_registration_hook(count),
    ]
    try:
        with ShapelessMode(MOST_WHILE_BUILDING):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def without_weights(model: nn.Module) -> nn.Module:
    """Put all parameters and the saved floating-point buffers of a model that was built just now on meta.

    Buffers that are not saved with a model follow from its configuration: they keep their numbers.
    """
    saved = _saved_buffers(model)
    moved: dict[int, Tensor] = {}
    for table, name, tensor in list(placed(model)):
        if isinstance(tensor, nn.Parameter):
            if id(tensor) not in moved:
                moved[id(tensor)] = _parameter(tensor)
            table[name] = moved[id(tensor)]
        elif id(tensor) in saved and tensor.is_floating_point() and tensor.numel() > 1:
            if id(tensor) not in moved:
                moved[id(tensor)] = torch.empty_like(unmasked(tensor), device="meta")
            table[name] = moved[id(tensor)]
        else:
            unmasked(tensor)
    return model


def _parameter(old: Tensor) -> nn.Parameter:
    data = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="meta")
    new: nn.Parameter = nn.Parameter(data, requires_grad=old.requires_grad)
    for name, value in vars(old).items():  # what libraries note on a parameter
        if name != "_is_param" and not name.startswith("_emscan"):
            setattr(new, name, value)
    return new


def _saved_buffers(model: nn.Module) -> set[int]:
    return {
        id(buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def lacks_weights(model: nn.Module) -> bool:
    """Whether some parameter or buffer of a module has no numbers."""
    return any(is_meta(tensor) for _, _, tensor in placed(model))


@contextmanager
def shapeless(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in the body although its weights, or some of them, are on meta. It comes back as it was."""
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    known: dict[int, Tensor] = {}
    for table, name, tensor in list(placed(model)):
        if not is_meta(tensor):
            continue
        changed.append((table, name, tensor))
        if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > MOST:
            masked(tensor)
        else:
            known.setdefault(id(tensor), plausible_buffer(tensor))
            table[name] = known[id(tensor)]
    try:
        with ShapelessMode():
            yield
    finally:
        for table, name, tensor in changed:
            table[name] = unmasked(tensor)
