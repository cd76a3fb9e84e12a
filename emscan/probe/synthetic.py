"""Synthetic probes: a shape that the model accepts, found by trial on a few samples, and random values of it.

The run of a trial leaves the model as it was. Among the shapes that a model accepts, one that keeps the samples apart
is preferred: a sequence-first recurrent layer accepts (samples, time, width) too, and mixes the samples up.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.limits import claim
from emscan.load.source import brief
from emscan.probe.batch import Batch
from emscan.probe.configured import configured, has_configuration
from emscan.probe.guesses import Guess, guesses
from emscan.probe.layout import exported_inputs, fixed_batch, parameter_device, parameter_dtype
from emscan.probe.signature import match_ordered, signature
from emscan.probe.trial import TRIAL, keeps_apart, run

SAMPLES = 256
DISTRIBUTIONS = ("normal", "uniform")
_MOST_ELEMENTS = 2**24  # of one input; fewer samples beyond
_WIDEST = 8  # bytes of an element
_MOST_TRIALS = 240
_PATIENCE = 60.0  # seconds of trials
_AFTER_FIRST = 40  # further trials in search of a shape that keeps samples apart


@dataclass(frozen=True)
class Synthetic:
    """A random batch that the model accepts; ``axis``: of the samples; ``source``: its values and shapes."""

    batch: Batch
    axis: int
    source: str


def synthesize(module: nn.Module, distribution: str, seed: int) -> Synthetic:
    """Return random inputs for ``module``, up to 256 samples, the same for the same seed.

    Floats are standard normal or uniform on [0, 1), integers uniform over the rows of the embedding that they index.
    A model that carries a configuration is asked first, with fewer samples. Raises ProbeError where no shape fits.
    """
    refusal = None
    if has_configuration(module):
        try:
            made = configured(module, seed=seed, distribution=distribution)
        except ProbeError as error:
            refusal = error
        else:
            return Synthetic(Batch((), made.values, None, made.samples), 0, made.describe())
    try:
        chosen = _choose(module, seed)
    except ProbeError as error:
        raise refusal or error from None
    fixed = fixed_batch(module) or 1
    largest = max(math.prod(guess.shape) for guess in chosen)
    samples = max(16, min(SAMPLES, _MOST_ELEMENTS // largest))
    samples = -(-samples // fixed) * fixed
    generator = torch.Generator().manual_seed(seed)
    values = [_draw(guess, samples, distribution, generator, module) for guess in chosen]
    call = match_ordered(values, signature(module), "the synthetic probe")
    described = ", ".join(_describe(guess, distribution) for guess in chosen)
    return Synthetic(Batch(call.args, call.kwargs, None, samples), chosen[0].axis, described)


def _choose(module: nn.Module, seed: int) -> tuple[Guess, ...]:
    _refuse_numbers(module)
    accepted: tuple[Guess, ...] | None = None
    failure: Exception | None = None
    left, start = _MOST_TRIALS, time.monotonic()
    for candidate in itertools.islice(_candidates(module), _MOST_TRIALS):
        left -= 1
        try:
            apart = _try(module, candidate, seed)
        except Exception as error:  # whatever a forward raises on a shape that it was not made for
            failure = failure or error
        else:
            if apart:
                return candidate
            left = left if accepted else min(left, _AFTER_FIRST)
            accepted = accepted or candidate
        if left <= 0 or time.monotonic() - start > _PATIENCE:
            break
    if accepted is not None:
        return accepted
    forward = signature(module)
    names = ", ".join(forward.required or [p.name for p in forward.parameters[:1]]) or "the inputs"
    reason = f" (the first try raised {brief(failure)})" if failure else ""
    raise ProbeError(
        f"no input shape could be derived for {type(module).__name__}.{forward}{reason}",
        f"give --probe FILE.safetensors with tensors for {names}, samples on axis 0",
    )


def _refuse_numbers(module: nn.Module) -> None:
    """Raise ProbeError where forward needs a number or a text, which no shape tells."""
    forward = signature(module)
    if forward.plain:
        needed = ", ".join(f"{name} ({kind})" for name, kind in forward.plain.items())
        raise ProbeError(
            f"{type(module).__name__}.{forward} needs {needed}, which cannot be derived from the model",
            "give --probe file.py:callable returning a dict of all arguments, or a file with a tensor for each",
        )


def _candidates(module: nn.Module) -> Iterator[tuple[Guess, ...]]:
    """Yield one guess per required input: the same for all first, then combinations of different layers'."""
    found = guesses(module)
    if exported_inputs(module) is not None:
        yield from itertools.product(*found)
        return
    inputs = max(1, len(signature(module).required))
    ordered = list(dict.fromkeys(_interleaved(found)))
    if inputs == 1:
        yield from ((guess,) for guess in ordered)
        return
    heads = list(dict.fromkeys(guess for layer in found for guess in (*layer[:1], *layer[-1:])))[:8]
    mixed = itertools.product(heads, repeat=inputs)
    for same, other in itertools.zip_longest(((guess,) * inputs for guess in ordered), mixed):
        yield from (candidate for candidate in (same, other) if candidate is not None)


def _interleaved(found: list[list[Guess]]) -> Iterator[Guess]:
    """Yield the first layer's guesses, a few of the later layers' in between: the first defined may not run first."""
    first, later = found[:1], found[1:8]
    queues = [iter(layer) for layer in later]
    yield from itertools.chain.from_iterable(first)
    for _ in range(max(map(len, later), default=0)):
        for queue in queues:
            yield from itertools.islice(queue, 1)


def _try(module: nn.Module, candidate: tuple[Guess, ...], seed: int) -> bool:
    """Run the model on a few samples, which raises where they do not fit; returns whether samples stay apart."""
    fixed = fixed_batch(module)
    samples = fixed or TRIAL
    claim(2 * _WIDEST * sum(math.prod(guess.full_shape(samples)) for guess in candidate))  # drawn, and copied to run
    generator = torch.Generator().manual_seed(seed)
    values = [_draw(guess, samples, "normal", generator, module, extreme=True) for guess in candidate]
    call = match_ordered(values, signature(module), "the trial")
    batch = Batch(call.args, call.kwargs, None, samples)
    if fixed is not None:
        run(module, batch, seed)
        return True
    return keeps_apart(module, batch, seed, candidate[0].axis)


def _draw(
    guess: Guess, samples: int, kind: str, generator: torch.Generator, module: nn.Module, *, extreme: bool = False
) -> Tensor:
    """Return random values; ``extreme`` puts the largest id first, so that a trial meets an index out of range."""
    shape = guess.full_shape(samples)
    device = parameter_device(module)
    if guess.high is not None:
        ids = torch.randint(guess.high, shape, generator=generator)
        if extreme:
            ids.view(-1)[0] = guess.high - 1
        return ids.to(device)
    draw = torch.rand if kind == "uniform" else torch.randn
    return draw(shape, generator=generator).to(device=device, dtype=parameter_dtype(module))


def _describe(guess: Guess, distribution: str) -> str:
    sizes = [str(size) for size in guess.shape]
    sizes.insert(guess.axis, "N")
    values = f"integers below {guess.high}" if guess.high is not None else f"{distribution} values"
    origin = f" (from {guess.origin})" if guess.origin else ""
    return f"{values} of shape ({', '.join(sizes)}){origin}"
