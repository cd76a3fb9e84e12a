"""Batches of arguments for forward: splitting along the samples, and copies that a model may write on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError, UsageError
from emscan.probe.layout import fixed_batch
from emscan.report.document import ProbeInfo

MOST_SAMPLES = 1024  # per batch, where the user asks for no batch size
INPUT_BUDGET = 2**20  # input elements per batch, where the user asks for no batch size
ID_WEIGHT = 256  # an integer id stands for an embedded vector of about this width


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of forward. ``samples``: the length of the sample axis."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor | None
    samples: int

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the batch, the targets last."""
        found: list[Tensor] = []
        map_tensors(found.append, (self.args, self.kwargs, self.targets))
        return found


class Probe:
    """What the model is run on: iterable over `Batch`; ``info`` is filled while iterating.

    ``total_batches`` is None where the length of the user's iterable is unknown. ``notes`` say what is odd about it.
    Raises ProbeError where there is no sample, or where a one-shot iterator is asked for a second pass.
    """

    def __init__(self, info: ProbeInfo, passes: Callable[[], Iterator[Batch]], total_batches: int | None) -> None:
        self.info = info
        self.notes: list[str] = []
        self.look: Callable[[Batch, int], list[str]] | None = None  # gives notes on a batch; how many samples before it
        self.total_batches = total_batches
        self._passes = passes

    def __iter__(self) -> Iterator[Batch]:
        """Start one pass; the largest pass counts in ``info``, so that a look at the first batch changes nothing."""
        samples = batches = 0
        for batch in self._passes():
            if self.look is not None:
                self.notes += self.look(batch, samples)
            samples, batches = samples + batch.samples, batches + 1
            self.info.samples = max(self.info.samples, samples)
            self.info.batches = max(self.info.batches, batches)
            yield batch
        if not samples:
            raise ProbeError(f"the probe {self.info.source} holds no sample", "give at least one")


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return ``tree`` (tuples, lists, dicts) with ``function`` applied to its tensors, other objects as they are."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)([map_tensors(function, item) for item in tree])
    if isinstance(tree, dict):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return tree


@dataclass(frozen=True)
class Placing:
    """Where tensors go: ``device`` (None: where they are), ``dtype`` of floating inputs (None: as they are).

    ``release`` is told of every batch that was copied, so that what it was read from can be let go.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    release: Callable[[Batch], None] | None = None

    def place(self, batch: Batch) -> Batch:
        """Return a batch of copies; one tensor given twice stays one tensor, as self-attention asks ``q is k``."""
        copies: dict[int, Tensor] = {}

        def copy(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = self._copy(tensor)
            return copies[id(tensor)]

        targets = batch.targets
        if targets is not None:
            targets = targets.detach().to(self.device)
            if not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool):
                targets = targets.long()  # labels are often stored as bytes
        placed = Batch(map_tensors(copy, batch.args), map_tensors(copy, batch.kwargs), targets, batch.samples)
        if self.release is not None:
            self.release(batch)
        return placed

    def _copy(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        # A copy always: a model that starts with an in-place operator would overwrite the user's data.
        return tensor.detach().to(device=self.device, dtype=dtype or tensor.dtype, copy=True)


def check_samples(batch: Batch, names: dict[int, str], where: str, axis: int = 0) -> None:
    """Raise ProbeError unless all tensors have one length along the sample axis; ``names``: id -> name of a tensor.

    A tensor without axes goes to every sample, where others have some.
    """
    lengths = {}
    for index, tensor in enumerate(batch.tensors()):
        name = names.get(id(tensor), f"tensor {index}")
        at = 0 if tensor is batch.targets else axis
        if not tensor.ndim and tensor is not batch.targets and batch.samples:
            continue
        if tensor.ndim <= at:
            raise ProbeError(f"{where}: {name} has no sample axis", "put the samples on axis 0")
        lengths[name] = tensor.shape[at]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise ProbeError(f"{where}: the tensors disagree on the number of samples ({listed})", "put samples on axis 0")
    if not batch.samples:
        raise ProbeError(f"{where} holds no sample", "give at least one")


def default_batch_size(batch: Batch) -> int:
    """Return how many samples to run at once: at most 1,024, and about a million input elements."""
    inputs = Batch(batch.args, batch.kwargs, None, batch.samples).tensors()
    weights = [t.numel() * (1 if t.is_floating_point() else ID_WEIGHT) for t in inputs]
    per_sample = max(1, sum(weights) // max(1, batch.samples))
    return max(1, min(MOST_SAMPLES, INPUT_BUDGET // per_sample))


def check_batch_size(size: int | None) -> None:
    """Raise UsageError for a batch size that is no positive number."""
    if size is not None and size < 1:
        raise UsageError(f"--batch-size {size} is not positive", "give 1 or more")


def fixed_step(module: nn.Module, size: int | None, samples: int) -> int | None:
    """Return the batch size that an exported program insists on, None for other models; raises where it cannot be."""
    fixed = fixed_batch(module)
    if fixed is None:
        return None
    if size not in (None, fixed):
        raise UsageError(
            f"--batch-size {size}: the exported program takes exactly {fixed} samples at a time", "leave it out"
        )
    if samples % fixed:
        raise ProbeError(
            f"the exported program takes exactly {fixed} samples at a time and the probe has {samples}",
            f"give a multiple of {fixed}, or export with a dynamic batch dimension",
        )
    return fixed


def count_batches(samples: int, size: int) -> int:
    """Return the number of batches of ``size`` samples, the last one possibly smaller."""
    return -(-samples // size)


def part(batch: Batch, start: int, length: int, axis: int = 0) -> Batch:
    """Return a view of ``length`` samples along ``axis`` of the inputs (axis 0 of the targets)."""
    views: dict[int, Tensor] = {}

    def view(tensor: Tensor) -> Tensor:
        if id(tensor) not in views:
            views[id(tensor)] = tensor.narrow(axis, start, length) if tensor.ndim else tensor
        return views[id(tensor)]

    targets = None if batch.targets is None else batch.targets.narrow(0, start, length)
    return Batch(map_tensors(view, batch.args), map_tensors(view, batch.kwargs), targets, length)


def split(batch: Batch, size: int, axis: int = 0) -> Iterator[Batch]:
    """Yield consecutive views of at most ``size`` samples."""
    for start in range(0, batch.samples, size):
        yield part(batch, start, min(size, batch.samples - start), axis)
