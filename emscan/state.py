"""Run a user's model and give it back exactly as it was."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._fuser import optimized_execution
from torch.jit._trace import TopLevelTracedModule

# Mappings that are restored in place; hooks too, as a library may install its own on the first run.
_TABLES = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the body in eval mode with seeded generators; then restore modes, buffers, attributes and generators.

    Attributes are restored because a model that caches a tensor during an inference-mode run could not be trained
    afterwards. ``train()`` and ``eval()`` are not called: users override them.
    """
    modules = list(model.modules())
    # A frozen ScriptModule has no mode; that of an exported graph says only in which one the graph was taken.
    modes = [None if keeps_mode(module) else getattr(module, "training", None) for module in modules]
    scripted = [isinstance(module, torch.jit.ScriptModule) for module in modules]
    attributes = [None if s else _attributes(m) for m, s in zip(modules, scripted, strict=True)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    drawn = generators()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, mode in zip(modules, modes, strict=True):
            if mode is not None:
                module.training = False
        for module, saved in zip(modules, attributes, strict=True):
            if saved is not None:
                module._modules.update(
                    {name: unwrapped(child) for name, child in saved["_modules"].items() if child is not None}
                )
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide attention and gate
        with uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        restore_generators(drawn)
        for module, saved in zip(modules, attributes, strict=True):
            if saved is not None:
                _restore_attributes(module, saved)
        for module, mode in zip(modules, modes, strict=True):
            if mode is not None:
                module.training = mode
        for buffer, saved_buffer in buffers:
            if not _same(buffer, saved_buffer):
                with torch.no_grad():
                    buffer.copy_(saved_buffer)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrappers."""
    inner = getattr(module, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


def keeps_mode(module: nn.Module) -> bool:
    """Whether the module is a graph (exported, or traced by TorchScript) whose ``train()`` and ``eval()`` do nothing."""
    exported = isinstance(module, torch.fx.GraphModule) and {"train", "eval"} <= vars(module).keys()
    return exported or isinstance(module, TopLevelTracedModule)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what ``torch.compile`` has compiled as the Python code that it was made from, and TorchScript operator by
    operator: optimized code calls other operators than those that the model is written in, or none.

    The compiler is not imported for this: where it is not loaded yet, nothing is compiled yet, and what the model
    compiles during the run is covered by the variable that the compiler reads.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    loaded = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()
    os.environ[name] = "1"
    try:
        with stance, optimized_execution(False):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def afresh(model: nn.Module, *, rehearsal: bool = False) -> Iterator[None]:
    """Run the body once; what the model then keeps in attributes is forgotten, so that the next pass computes it too.

    ``rehearsal``: the next pass also draws the same random numbers.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    saved = [_attributes(module) for module in modules]
    drawn = generators() if rehearsal else None
    try:
        yield
    finally:
        for module, attributes in zip(modules, saved, strict=True):
            _restore_attributes(module, attributes)
        if drawn is not None:
            restore_generators(drawn)


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


def generators() -> tuple[Any, ...]:
    """Return the states of torch's, Python's and NumPy's random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def restore_generators(saved: tuple[Any, ...]) -> None:
    """Bring the random generators back to ``saved``."""
    cpu, cuda, python, numpy = saved
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)
