"""Whether the model is inside a block that stops gradients, which a run without gradients does not show otherwise."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

_APPLY = vars(torch.autograd.Function)["apply"].__func__.__code__


@dataclass
class _Open:
    """A block that is not closed yet, or a call of ``set_grad_enabled`` that a later one may take back."""

    block: Any
    before: bool
    called: bool = False


class GradMode:
    """What gradient mode the model's own blocks have set. Torch's own says "off" throughout, as the run is without."""

    def __init__(self, scripted: bool) -> None:
        self.enabled = True
        self.open: list[_Open] = []
        self.quiet = False  # torch's blocks use each other
        self._scripted = scripted

    @property
    def off(self) -> bool:
        """Inside a block that stops gradients."""
        if not self._scripted:
            return not self.enabled
        return not torch.is_grad_enabled() and not any(frame.f_code is _APPLY for frame in _frames())


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Run the body in inference mode. TorchScript's blocks run in C++ and show only in torch's own gradient mode, so
    that one is on for a model that is TorchScript altogether: nothing in it could make use of gradients."""
    with torch.inference_mode(), torch.set_grad_enabled(isinstance(model, torch.jit.ScriptModule)):
        yield


@contextmanager
def grad_mode(model: nn.Module) -> Iterator[GradMode]:
    """Follow ``torch.no_grad``, ``enable_grad``, ``inference_mode`` and ``set_grad_enabled`` while the body runs.

    The classes themselves are watched: a function mode would see them too, but it changes which operators factories
    call.
    """
    watch = GradMode(isinstance(model, torch.jit.ScriptModule))
    with ExitStack() as stack:
        for cls, value in ((torch.no_grad, False), (torch.enable_grad, True), (torch.inference_mode, None)):
            stack.enter_context(_replaced(cls, "__enter__", functools.partial(_entered, watch, value)))
            stack.enter_context(_replaced(cls, "__exit__", functools.partial(_left, watch)))
        for name, watched in (("__init__", _set), ("__enter__", _kept), ("__exit__", _left)):
            stack.enter_context(_replaced(torch.set_grad_enabled, name, functools.partial(watched, watch)))
        yield watch


@contextmanager
def _replaced(cls: type, name: str, watched: Callable[..., Any]) -> Iterator[None]:
    original = cls.__dict__[name]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watched(original, self, *args, **kwargs)

    setattr(cls, name, method)
    try:
        yield
    finally:
        setattr(cls, name, original)


def _entered(watch: GradMode, value: bool | None, original: Any, block: Any) -> Any:
    watch.open.append(_Open(block, watch.enabled))
    result = _quietly(watch, original, block)
    if not _in_autograd_function():
        watch.enabled = not block.mode if value is None else value
    return result


def _left(watch: GradMode, original: Any, block: Any, *error: Any) -> Any:
    result = _quietly(watch, original, block, *error)
    places = [place for place, entry in enumerate(watch.open) if entry.block is block]
    if places:
        watch.enabled = watch.open[places[-1]].before
        del watch.open[places[-1] :]
    return result


def _set(watch: GradMode, original: Any, block: Any, mode: bool) -> None:
    """``set_grad_enabled(mode)``: a new state, or the restoration of what it was before the last such call."""
    original(block, mode)
    if watch.quiet:
        return
    last = watch.open[-1] if watch.open else None
    if last is not None and last.called and last.block.prev == mode:
        watch.enabled = watch.open.pop().before
    else:
        watch.open.append(_Open(block, watch.enabled, called=True))
        watch.enabled = mode


def _kept(watch: GradMode, original: Any, block: Any) -> None:
    """``with set_grad_enabled(mode)``: what its making has set holds until it is left."""
    original(block)
    for entry in watch.open:
        if entry.block is block:
            entry.called = False


def _quietly(watch: GradMode, original: Any, *args: Any) -> Any:
    before, watch.quiet = watch.quiet, True
    try:
        return original(*args)
    finally:
        watch.quiet = before


def _in_autograd_function() -> bool:
    """Whether the block stands within the forward of a ``torch.autograd.Function``, whose backward is its own affair:
    reentrant checkpointing and reversible layers run blocks without gradients and compute them later."""
    return any(frame.f_code is _APPLY for frame in _frames())


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
