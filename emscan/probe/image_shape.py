"""Which channels and size of image a model takes: what its folder and options leave open is tried on two images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.probe.batch import Batch
from emscan.probe.guesses import guesses
from emscan.probe.layout import fixed_batch, parameter_device, parameter_dtype
from emscan.probe.recipe import Recipe, fit_channels
from emscan.probe.signature import Signature, match_named, match_ordered, signature
from emscan.probe.trial import run

_CHANNELS = (1, 3, 4)
_MOST_TRIALS = 60
_FEW = 2
Size = tuple[int, int]


@dataclass(frozen=True)
class Settled:
    """A recipe without open questions. ``native``: the common size of images that are not resized; ``classes``: the
    number of scores that the model gave for an image, None where it gave no vector of scores or could not be tried."""

    recipe: Recipe
    native: Size | None
    classes: int | None


def settled(module: nn.Module, said: Recipe, common: Callable[[], Size | None], seed: int) -> Settled:
    """Return the recipe with channels and size filled in; ``common()`` gives the one size of all images, if any.

    Raises ProbeError where no size can be told.
    """
    sized = said.final is not None
    wanted = None if sized or said.short is not None else _configured_size(module)
    native = None if sized or said.short is not None or wanted is not None else common()
    tried = list(itertools.islice(_candidates(module, said, wanted, native), _MOST_TRIALS))
    for channels, size in tried:
        output = _output(module, channels, size, seed)
        if output is not None:
            return _settled(said, channels, size, native, _classes(output))
    if said.short is not None and not sized:
        return Settled(fit_channels(said, tried[0][0] if tried else 3), None, None)
    if tried and (sized or wanted is not None or native is not None):
        return _settled(said, *tried[0], native, None)  # the run itself will say what does not fit
    why = "the images differ in size" if tried else "no layer of the model reads images"
    raise ProbeError(
        f"{why}, and nothing says which size the model takes",
        "add --probe-arg size=224 or size=HEIGHTxWIDTH",
    )


def _settled(said: Recipe, channels: int, size: Size, native: Size | None, classes: int | None) -> Settled:
    if said.final is not None or said.short is not None or size == native:
        return Settled(fit_channels(said, channels), size if size == native else None, classes)
    if size[0] == size[1]:
        chosen = replace(said, short=size[0], crop=size, origin=said.origin or "what the model accepts")
    else:
        chosen = replace(said, edges=size, origin=said.origin or "what the model accepts")
    return Settled(fit_channels(chosen, channels), None, classes)


def _candidates(
    module: nn.Module, said: Recipe, wanted: Size | None, native: Size | None
) -> Iterator[tuple[int, Size]]:
    """Yield channels and sizes, the likeliest first."""
    pairs = [
        (guess.shape[0], (guess.shape[1], guess.shape[2]))
        for layer in guesses(module)
        for guess in layer
        if len(guess.shape) == 3 and guess.high is None and guess.axis == 0 and guess.shape[0] in _CHANNELS
    ]
    configured = _configured_channels(module)
    likely = [said.channels] if said.channels else [configured] if configured else [*(c for c, _ in pairs), 3, 1]
    channels = list(dict.fromkeys(c for c in likely if c is not None))
    known = said.final or wanted or native
    if known is not None:
        yield from ((number, known) for number in channels)
    if said.final is None and wanted is None:
        yield from dict.fromkeys(pair for pair in pairs if pair[0] in channels)


def _output(module: nn.Module, channels: int, size: Size, seed: int) -> Tensor | None:
    """Return the model's first output for random images, None where it raises."""
    count = fixed_batch(module) or _FEW
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((count, channels, *size), generator=generator)
    values = values.to(device=parameter_device(module), dtype=parameter_dtype(module))
    try:
        batch = image_batch({"": values}, signature(module), module, "the trial")
        return run(module, Batch(batch.args, batch.kwargs, None, count), seed)
    except Exception:  # whatever a forward raises on a shape that it was not made for
        return None


def image_batch(values: dict[str, Tensor], forward: Signature, module: nn.Module, where: str) -> Batch:
    """Return the call with images (under "") and what goes with them, by the name that the model gives its images."""
    names = [parameter.name for parameter in forward.parameters]
    main = getattr(module, "main_input_name", None)
    known = [name for name in ("pixel_values", main) if isinstance(name, str) and name in names]
    images, others = values[""], {name: value for name, value in values.items() if name}
    if known:
        return match_named({known[0]: images, **others}, forward, where)
    return match_ordered([images], forward, where)


def _classes(output: Tensor) -> int | None:
    return output.shape[1] if output.ndim == 2 and output.is_floating_point() else None


def _configured(module: nn.Module, *names: str) -> Any:
    config = getattr(module, "config", None)
    for part in (config, getattr(config, "vision_config", None)):
        for name in names:
            value = getattr(part, "__dict__", {}).get(name)
            if value is not None:
                return value
    return None


def _configured_size(module: nn.Module) -> Size | None:
    size = _configured(module, "image_size")
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides):
        return sides[0], sides[1]
    return None


def _configured_channels(module: nn.Module) -> int | None:
    channels = _configured(module, "num_channels", "in_channels", "in_chans")
    return channels if channels in _CHANNELS else None
