"""Naming computations as they run: every tensor carries the key of the computation that made it.

A key is a hash over the operator, its axis-like arguments and the keys of what it read; parameters and inputs are
named by what they are. It does not contain sizes or numbers, so the same computation has the same key in every
batch, whatever its length. A layer (an operator that meets input and parameters) starts anew from its parameters: what
happened before it, such as which experts a batch has woken, does not change its name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emscan.trace import fused
from emscan.trace.operators import CONTRACTION, LOOKUP, NORMALIZATION, RECURRENT

# Arguments that say what an operator does rather than how much data it does it to.
_KEYED = frozenset(
    {"dim", "dims", "dim0", "dim1", "axis", "start_dim", "end_dim", "equation", "approximate", "ord", "descending"}
    | {"largest", "return_indices", "is_causal", "reduce", "source", "destination"}
)
LAYERS = CONTRACTION | LOOKUP | NORMALIZATION | frozenset(RECURRENT)
Name = tuple[int, bool]  # key of a computation, and whether parameters and buffers alone went into it
_KEYED_INDEX = frozenset({"select", "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind"})


@functools.lru_cache(maxsize=4096)
def packet_name(func: Any) -> str:
    """Return ``namespace.operator``; an in-place operator has the name of its functional form where one exists."""
    namespace, _, name = func._schema.name.partition("::")
    base = name.removesuffix("_")
    if name.endswith("_") and not name.endswith("__") and hasattr(getattr(torch.ops, namespace), base):
        name = base
    return f"{namespace}.{name}"


@functools.lru_cache(maxsize=4096)
def _keyed_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    indexed = packet_name(func).rpartition(".")[2] in _KEYED_INDEX
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.name in _KEYED or (indexed and argument.name in {"index", "start"})
    )


@functools.lru_cache(maxsize=4096)
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that ``func`` writes to."""
    if not func._schema.is_mutable:
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Call the operator as it runs without a mode.

    Below a mode, torch does not fold the leading axes of a strided 3-D input into one matrix product, and a linear
    layer takes half as long again; the rows are folded here.
    """
    if func is torch.ops.aten.linear.default and not kwargs and args[0].dim() == 3 and args[1].dim() == 2:
        x = args[0]
        if not x.is_contiguous() and not x.is_meta:
            return func(x.reshape(-1, x.shape[-1]), *args[1:]).view(*x.shape[:-1], args[1].shape[0])
    return func(*args, **kwargs)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or outputs, in order; dataclasses and objects with fields included."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)
    elif hasattr(tree, "__dataclass_fields__"):
        for name in tree.__dataclass_fields__:
            yield from tensors_in(getattr(tree, name, None))


class Leaves:
    """The tensors that exist before the run: parameters, buffers and inputs, found by identity of storage."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.by_id: dict[int, tuple[str, str]] = {}
        self.by_storage: dict[int, tuple[str, str]] = {}
        self._alive: list[Tensor] = []
        self.bare = next(iter(model.parameters()), None) is None
        for kind, named in (("param", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._add(kind, name, tensor)
        for name, tensor in inputs.items():
            self._add("input", name, tensor)

    def _add(self, kind: str, name: str, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self.by_id.setdefault(id(tensor), (kind, name))
        if tensor.layout == torch.strided and tensor.numel():
            self.by_storage.setdefault(storage_id(tensor), (kind, name))

    def find(self, tensor: Tensor) -> tuple[str, str] | None:
        """Return (kind, name) of the leaf that ``tensor`` is or is a view of."""
        found = self.by_id.get(id(tensor))
        if found is None and tensor.layout == torch.strided:
            found = self.by_storage.get(storage_id(tensor))
        return found


def storage_id(tensor: Tensor) -> int:
    """Return the identity of the memory behind a tensor."""
    return int(tensor.untyped_storage()._cdata)


class Tracker(TorchDispatchMode):
    """Follow every operator call of one forward pass. Subclasses see calls through ``before`` and ``after``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler for the sake of this mode: 800 modules, 70 MiB and seconds."""
        return False

    def __init__(self, leaves: Leaves) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaves = leaves
        self._token = object()  # a tag from an earlier pass, on a tensor that a model cached, is not this pass's
        self._aliased = False

    # -- what a tensor carries ------------------------------------------------------------------
    def key_of(self, tensor: Tensor) -> int:
        """Return the key of the computation that made ``tensor``'s present contents."""
        key, _ = self._name(tensor)
        return key

    def _name(self, tensor: Tensor) -> Name:
        """Return the key of a tensor, and whether it was made of parameters and buffers alone."""
        tag = getattr(tensor, "_emscan", None)
        if tag is None or tag[0] is not self._token:
            return self._leaf_name(tensor)
        if self._aliased:
            writes = self._writes(tensor)
            if len(writes) > tag[2]:
                return hash(("mutated", tag[1], *writes[tag[2] :])), False
        named: Name = tag[1], tag[3]
        return named

    def _leaf_name(self, tensor: Tensor) -> Name:
        found = self.leaves.find(tensor)
        if found is None:
            return hash(("const", tensor.dtype)), False
        return hash((*found, tensor.ndim)), found[0] != "input"

    def _writes(self, tensor: Tensor) -> list[int]:
        if tensor.layout != torch.strided:
            return []
        tag = getattr(tensor.untyped_storage(), "_emscan", None)
        keys: list[int] = tag[1] if tag is not None and tag[0] is self._token else []
        return keys

    def _tag(self, tensor: Tensor, key: int, pure: bool) -> None:
        if id(tensor) in self.leaves.by_id:
            return
        seen = len(self._writes(tensor)) if self._aliased else 0
        tensor._emscan = (self._token, key, seen, pure)  # type: ignore[attr-defined]

    def _log_write(self, tensor: Tensor, key: int) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        tag = getattr(storage, "_emscan", None)
        if tag is None or tag[0] is not self._token:
            writes: list[int] = []
            tag = (self._token, writes)
            storage._emscan = tag  # type: ignore[attr-defined]
        tag[1].append(key)
        self._aliased = True

    # -- the pass itself ------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = fused.DECOMPOSITIONS.get(func)
        if replacement is not None:
            with self:
                return replacement(*args, **kwargs)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        names = [self._name(tensor) for tensor in inputs]
        pure = bool(names) and all(own for _, own in names)
        if not pure and any(own for _, own in names) and packet_name(func) in LAYERS:
            names = [name for name in names if name[1]]
        if func is torch.ops.aten.detach.default:
            # factories detach what they made if somebody else still holds it, as a recorder does: no new name
            key = names[0][0]
        else:
            key = hash((func, *self._static(func, args, kwargs), *(name for name, _ in names)))
        call = self.before(func, key, args, kwargs, inputs)
        out = _run(func, args, kwargs)
        for position, name in written_arguments(func):
            target = args[position] if position < len(args) else kwargs.get(name)
            for tensor in tensors_in(target):
                self._log_write(tensor, key)
                self._tag(tensor, key, pure)
        outputs = list(tensors_in(out))
        for index, tensor in enumerate(outputs):
            self._tag(tensor, hash((key, index)) if index else key, pure)
        self.after(call, func, key, args, kwargs, outputs)
        return out

    def _static(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        found: list[Any] = []
        for position, name in _keyed_arguments(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            if not isinstance(value, Tensor):
                found.append(tuple(value) if isinstance(value, list) else value)
        return found

    def before(self, func: Any, key: int, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """See a call before it runs; what is returned is handed to ``after``."""

    def after(self, call: Any, func: Any, key: int, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """See a call and its outputs after it ran."""


@contextmanager
def module_stack(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that holds, while the model runs, the fully qualified names of the modules being called.

    Global hooks, so that nothing is attached to the user's modules. Submodules of a ScriptModule call no hooks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _args: Any) -> None:
        stack.append(names.get(id(module), stack[-1] if stack else ""))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if stack:
            stack.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield stack
    finally:
        before.remove()
        after.remove()
