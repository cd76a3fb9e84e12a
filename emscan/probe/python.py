"""Probes from Python objects: a tensor, a tuple, a dict, or an iterable of batches of these, consumed lazily."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from emscan.errors import ProbeError
from emscan.probe.batch import (
    Batch,
    Placing,
    Probe,
    check_batch_size,
    check_samples,
    count_batches,
    default_batch_size,
    fixed_step,
    map_tensors,
    part,
    split,
)
from emscan.probe.layout import parameter_device, parameter_dtype, sequence_first
from emscan.probe.objects import batched, named, with_tensors
from emscan.probe.signature import Signature, match_named, match_ordered, signature
from emscan.probe.trial import TRIAL, keeps_apart
from emscan.probe.usercode import guarded_iterator
from emscan.report.document import ProbeInfo

_FORMS = "give a tensor, a tuple of tensors, a dict of tensors, or an iterable of such batches"


def from_python(inputs: Any, targets: Any, module: nn.Module, *, batch_size: int | None = None, seed: int = 0) -> Probe:
    """Return the probe over ``inputs``; tensors keep their dtype and go to the device of the module's parameters.

    ``inputs``: a tensor; a tuple or list of tensors, which are forward's arguments in order where there are not more
    of them than forward takes; a dict, matched by name; or an iterable of such batches, consumed lazily. A list of
    tensors that are alike (dtype, and shape but for axis 0), more than forward must have, is one of batches; ones of
    other lengths could be either. In a pair (x, y) of which forward takes one, y is the target. NumPy arrays count as
    tensors. All tensors share axis 0, the samples; without a batch size they are split as `default_batch_size` says,
    batches of an iterable stay as they are. Arguments without a common axis 0, and inputs whose axis 0 is time to a
    sequence-first layer, are run unsplit.
    ``targets``: a tensor for all samples, or an iterable of tensors beside an iterable of batches.
    Raises ProbeError for anything else, UsageError for a batch size that is not positive.
    """
    check_batch_size(batch_size)
    source = type(inputs).__name__
    return any_probe(
        ProbeInfo(source, seed=seed), Reopen(inputs), targets, module, Placing(parameter_device(module)), batch_size
    )


def any_probe(
    info: ProbeInfo, opened: Reopen, targets: Any, module: nn.Module, placing: Placing, size: int | None
) -> Probe:
    """Return the probe over a batch or an iterable of batches, whichever ``opened`` gives."""
    forward = signature(module)
    inputs = with_tensors(opened.values, parameter_dtype(module))
    if is_batch(inputs, forward):
        info.source = f"{info.source} {_described(inputs)}".rstrip()
        whole = to_batch(inputs, forward, "the input")
        strict = size is not None or not sequence_first(module, whole.tensors())  # else axis 0 may be time
        whole = _with_targets(whole, targets, "the input", strict)
        return whole_probe(info, whole, module, placing, size)
    if isinstance(inputs, str | bytes) or not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")):
        raise ProbeError(f"the input is a {type(inputs).__name__}", _FORMS)
    return stream_probe(info, opened, module, placing, size, targets)


def whole_probe(
    info: ProbeInfo, whole: Batch, module: nn.Module, placing: Placing, size: int | None, axis: int = 0
) -> Probe:
    """Return the probe that splits one big batch along ``axis``."""
    step = _step(whole, module, size, placing, axis)
    if step is None:
        return Probe(info, lambda: iter([placing.place(whole)]), 1)
    return Probe(info, lambda: map(placing.place, split(whole, step, axis)), count_batches(whole.samples, step))


def _step(whole: Batch, module: nn.Module, size: int | None, placing: Placing, axis: int) -> int | None:
    """Return the samples per batch, None where the batch cannot be split."""
    fixed = fixed_step(module, size, whole.samples)
    if fixed is not None:
        return fixed
    if size is not None:
        check_samples(whole, {}, "the input", axis)
        return size
    return None if not _aligned(whole, axis) or _mixes(whole, module, placing, axis) else default_batch_size(whole)


def _mixes(whole: Batch, module: nn.Module, placing: Placing, axis: int) -> bool:
    """Whether axis 0 is time to a sequence-first layer, so that cutting there would change the numbers."""
    if axis or not sequence_first(module, whole.tensors()):
        return False
    try:
        return not keeps_apart(module, placing.place(part(whole, 0, min(TRIAL, whole.samples))), 0)
    except Exception:  # the run itself will say so
        return False


def stream_probe(
    info: ProbeInfo, opened: Reopen, module: nn.Module, placing: Placing, size: int | None, targets: Any
) -> Probe:
    """Return the probe over an iterable of batches, with ``targets`` (a tensor, an iterable or None) beside it."""
    forward, dtype = signature(module), parameter_dtype(module)

    def passes() -> Iterator[Batch]:
        values = batched(opened(), size)
        beside = _Targets(targets)
        for number, value in enumerate(guarded_iterator(values, info.source), start=1):
            where = f"batch {number} of the probe"
            value = with_tensors(named(value, forward), placing.dtype or dtype)
            if not isinstance(value, Tensor | PackedSequence | tuple | list | dict):
                raise ProbeError(f"{where} is a {type(value).__name__}", _FORMS)
            batch = to_batch(value, forward, where, streamed=True)
            batch = _with_targets(batch, beside.take(batch.samples), where)
            pieces = split(batch, size) if size is not None and _aligned(batch) else iter([batch])
            yield from map(placing.place, pieces)
        beside.close()

    return Probe(info, passes, _length(batched(opened.values, size)) if size is None else None)


def _length(values: Any) -> int | None:
    try:
        return len(values)
    except Exception:  # a loader over a stream has the method and raises
        return None


def is_batch(value: Any, forward: Signature) -> bool:
    """Whether ``value`` is one set of arguments, not an iterable of batches."""
    if isinstance(value, Tensor | PackedSequence | dict | tuple):
        return True
    if not isinstance(value, list) or not value or not isinstance(value[0], Tensor):
        return False
    if not all(isinstance(item, Tensor) for item in value):
        return False
    alike = len({(item.dtype, item.shape[1:]) for item in value}) == 1  # two batches, not inputs and targets
    if max(1, len(forward.required)) < len(value) and forward.most != math.inf:
        if alike:
            return False  # a second batch is not what the parameter with a default is for
        if len(value) <= forward.most and len({(item.dtype, item.ndim) for item in value}) == 1:
            shapes = " and ".join(str(tuple(item.shape)) for item in value)
            raise ProbeError(
                f"a list of tensors of shape {shapes} could be {len(value)} batches or {len(value)} arguments of {forward}",
                "give arguments as a tuple, batches as a list of one-element tuples",
            )
    return len(value) <= forward.most or (not alike and _is_pair(tuple(value), forward, streamed=False))


def to_batch(value: Any, forward: Signature, where: str, *, streamed: bool = False) -> Batch:
    """Return the Batch that a tensor, tuple, list or dict stands for; ``streamed``: it is one of many."""
    if isinstance(value, dict):
        batch = match_named(value, forward, where)
        names = {id(item): str(name) for name, item in value.items()}
    elif isinstance(value, Tensor | PackedSequence):
        batch, names = match_ordered([value], forward, where), {}
    else:
        *inputs, last = value if value else (None,)
        names = {id(item): f"input {index}" for index, item in enumerate(value)}
        if _is_pair(tuple(value), forward, streamed):
            batch = match_ordered(inputs, forward, where)
            batch = Batch(batch.args, batch.kwargs, last, 0)
        else:
            batch = match_ordered(list(value), forward, where)
    return _counted(batch, names, where, strict=batch.targets is not None)


def _is_pair(value: tuple[Any, ...], forward: Signature, streamed: bool) -> bool:
    """Whether the last tensor is the target: forward has no place for it, or it is a class index per sample."""
    if len(value) < 2 or not isinstance(value[-1], Tensor):
        return False
    if len(value) == forward.most + 1:
        return True
    last = value[-1]
    integer = not (last.is_floating_point() or last.is_complex() or last.dtype == torch.bool)
    # Loaders give (x, y) even where forward has further, optional parameters.
    return streamed and len(value) == 2 and len(forward.required) == 1 and integer and last.ndim == 1


def _counted(batch: Batch, names: dict[int, str], where: str, strict: bool) -> Batch:
    tensors = batch.tensors()
    packed = next((item for item in batch.args if isinstance(item, PackedSequence)), None)
    if packed is not None:
        samples = int(packed.batch_sizes[0])
    elif not tensors:
        raise ProbeError(f"{where} holds no tensor", _FORMS)
    else:
        samples = tensors[0].shape[0] if tensors[0].ndim else 1
    counted = Batch(batch.args, batch.kwargs, batch.targets, samples)
    if packed is None and (strict or not samples):
        check_samples(counted, names, where)
    return counted


def _aligned(batch: Batch, axis: int = 0) -> bool:
    """Whether all tensors share the sample axis, so that the batch can be split."""
    shared = [t for t in batch.tensors() if t.ndim or t is batch.targets]  # one entry goes to every sample
    return bool(shared) and all(t.ndim > axis and t.shape[axis] == batch.samples for t in shared) and not any(
        isinstance(item, PackedSequence) for item in batch.args
    )  # fmt: skip


def _with_targets(batch: Batch, targets: Any, where: str, strict: bool = True) -> Batch:
    if targets is None:
        return batch
    targets = with_tensors(targets)
    if not isinstance(targets, Tensor):
        raise ProbeError(f"the targets are a {type(targets).__name__}", "give a tensor with one entry per sample")
    joined = Batch(batch.args, batch.kwargs, targets, batch.samples)
    if strict and (targets.ndim == 0 or targets.shape[0] != batch.samples):
        names = {id(tensor): f"input {index}" for index, tensor in enumerate(batch.tensors())}
        check_samples(joined, {**names, id(targets): "targets"}, where)
    return joined


class _Targets:
    """Targets beside a stream of batches: one tensor that is cut along, or an iterable with one tensor per batch."""

    def __init__(self, targets: Any) -> None:
        targets = with_tensors(targets)
        self._tensor = targets if isinstance(targets, Tensor) else None
        self._iterator = None if targets is None or self._tensor is not None else guarded_iterator(targets, "targets")
        self._taken = 0

    def take(self, samples: int) -> Any:
        """Return the targets of the next ``samples`` samples, None where there are none at all."""
        if self._iterator is not None:
            value = next(self._iterator, None)
            if value is None:
                raise ProbeError("the targets end before the batches", "give one tensor of targets per batch")
            return value
        if self._tensor is None:
            return None
        part = self._tensor[self._taken : self._taken + samples]
        self._taken += samples
        if len(part) < samples:
            raise ProbeError("the targets end before the batches", "give one target per sample")
        return part

    def close(self) -> None:
        """Raise ProbeError where targets are left over, which means that they were matched wrongly."""
        left = self._tensor is not None and self._taken < len(self._tensor)
        if left or (self._iterator is not None and next(self._iterator, None) is not None):
            raise ProbeError("there are more targets than samples", "give one target per sample")


class Reopen:
    """Gives an iterable at every pass: what ``again()`` returns, else ``values``, which may be used up after one."""

    def __init__(self, values: Any, again: Callable[[], Any] | None = None) -> None:
        self.values = values
        self._again = again
        self._used = False

    def __call__(self) -> Any:
        """Return the iterable of the next pass."""
        used, self._used = self._used, True
        if used and self._again is not None:
            return self._again()
        if used and hasattr(self.values, "__next__"):
            raise ProbeError("the batches are an iterator, which is used up", "give a list or an iterable class")
        return self.values


def _described(inputs: Any) -> str:
    shapes: list[str] = []
    map_tensors(lambda tensor: shapes.append(str(tuple(tensor.shape))), inputs)
    return f"of shape {', '.join(shapes)}" if shapes else ""
