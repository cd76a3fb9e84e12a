"""Run a user's model and give it back exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the body in eval mode with seeded generators; then restore modes, buffers, attributes and generators.

    Attributes are restored because a model that caches a tensor during an inference-mode run could not be trained
    afterwards. ``train()`` and ``eval()`` are not called: users override them.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    scripted = [isinstance(module, torch.jit.ScriptModule) for module in modules]
    attributes = [None if s else _attributes(m) for m, s in zip(modules, scripted, strict=True)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generators = _generators()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modules:
            module.training = False
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide attention and gate
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        _restore_generators(generators)
        for module, saved in zip(modules, attributes, strict=True):
            if saved is not None:
                _restore_attributes(module, saved)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for buffer, saved_buffer in buffers:
            if not _same(buffer, saved_buffer):
                with torch.no_grad():
                    buffer.copy_(saved_buffer)


def _attributes(module: nn.Module) -> dict[str, Any]:
    saved = dict(module.__dict__)
    return {**saved, **{table: dict(saved[table]) for table in _TABLES if table in saved}}


def _restore_attributes(module: nn.Module, saved: dict[str, Any]) -> None:
    current = module.__dict__
    tables = {table: current[table] for table in _TABLES if table in current}
    for name in [name for name in current if name not in saved]:
        del current[name]
    for name, value in saved.items():
        if name in tables:  # the same mapping object, for hooks and parametrizations that hold it
            tables[name].clear()
            tables[name].update(value)
            current[name] = tables[name]
        else:
            current[name] = value


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes (NaN equals itself)."""
    if a.is_meta:
        return True
    return bool(torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)))


def _generators() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def _restore_generators(saved: tuple[Any, ...]) -> None:
    cpu, cuda, python, numpy = saved
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)
