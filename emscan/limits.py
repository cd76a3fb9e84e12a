"""Keeps runs of a stranger's model within bounds of memory, and the trials that emscan makes by itself within bounds of
work: a file of a few kilobytes can describe a layer that pads by a million.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_SPARE = 2**30  # bytes beyond twice the limit that a process may still get: workspaces of kernels, stacks of threads
_WORK = 2**36  # bytes written by all trials of a model, after which no further one is made; about a minute
_PER_CALL = 50_000  # what a call costs by itself, in bytes written
_PRODUCT = 16  # multiplications of a matrix product that take as long as a byte


class TooLargeError(Exception):
    """An operator would allocate more than is allowed, or the trials have taken too long."""


@dataclass
class _Bounds:
    """``limit``: bytes that one operator's output may have; ``work`` done by the trials so far."""

    limit: int
    work: float = 0


_BOUNDS: ContextVar[_Bounds | None] = ContextVar("bounds", default=None)


@contextlib.contextmanager
def bounded(limit: int) -> Iterator[None]:
    """Let no trial in the body allocate more than ``limit`` bytes at once."""
    token = _BOUNDS.set(_Bounds(limit))
    try:
        yield
    finally:
        _BOUNDS.reset(token)


def claim(size: int) -> None:
    """Raise TooLargeError where the inputs of a trial, of ``size`` bytes, are beyond the bounds, if there are any."""
    bounds = _BOUNDS.get()
    if bounds is not None and size > bounds.limit:
        raise TooLargeError(f"its inputs would take {_mebibytes(size)}, {_mebibytes(bounds.limit)} are allowed")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Hold one trial run to the bounds, where there are any. Raises TooLargeError."""
    bounds = _BOUNDS.get()
    if bounds is None:
        yield
        return
    if bounds.work > _WORK:
        raise TooLargeError("the trials before it took too long")
    with ceiling(bounds.limit), _Guard(bounds):
        yield


class _Guard(TorchDispatchMode):
    """Ask every operator for the size of its output, by a run on shapes alone, before it runs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler for the sake of this mode: 800 modules, 70 MiB and seconds."""
        return False

    def __init__(self, bounds: _Bounds) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bounds = bounds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        views = any(value.alias_info is not None for value in func._schema.returns)
        if not views and not _keeps_shape(func, read):
            size = _output_bytes(func, args, kwargs)
            if size > self.bounds.limit:
                raise TooLargeError(
                    f"{func.overloadpacket} would take {_mebibytes(size)}, {_mebibytes(self.bounds.limit)} are allowed"
                )
        out = func(*args, **kwargs)
        self.bounds.work += _PER_CALL + (0 if views else _work(func, read, out))
        return out


def _keeps_shape(func: Any, read: list[Tensor]) -> bool:
    """Whether the output is as large as the inputs: nothing to ask."""
    return torch.Tag.pointwise in func.tags and bool(read) and all(one.shape == read[0].shape for one in read)


def _output_bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Return the bytes of an operator's output; 0 where shapes cannot tell, or the operator will refuse them itself."""

    def shape(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    try:
        args, kwargs = pytree.tree_map(shape, (args, kwargs))
        if "device" in {argument.name for argument in func._schema.arguments}:
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = func(*args, **kwargs)
        return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
    except Exception:  # no kernel for shapes, or the error that the operator itself will raise
        return 0


def _work(func: Any, read: list[Tensor], out: Any) -> float:
    """Return about how long an operator took, in bytes written; a product of matrices counts its multiplications."""
    made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and not leaf.is_meta]
    written = float(sum(leaf.numel() * leaf.element_size() for leaf in made))
    large = sorted((leaf.numel() for leaf in read if leaf.ndim > 1), reverse=True)[:2]
    if made and len(large) == 2 and torch.Tag.pointwise not in func.tags:
        written += math.sqrt(math.prod(large) * made[0].numel()) / _PRODUCT
    return written


@contextlib.contextmanager
def ceiling(limit: int) -> Iterator[None]:
    """Let the system refuse this process memory far beyond ``limit`` bytes, so that an allocation which no shape told
    of is an error of the run and not the end of the machine; where the system has no such limit, nothing happens."""
    try:
        import resource

        line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData"))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(line.split()[1]) * 1024 + 2 * limit + _SPARE
        most = min([wanted, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    except (ImportError, OSError, ValueError, StopIteration):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
