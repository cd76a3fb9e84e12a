"""Naming computations as they run: every tensor carries the key of the computation that made it.

A key is a hash over the operator, its axis-like arguments and the keys of what it read; parameters and inputs are
named by what they are. It does not contain sizes or numbers, so the same computation has the same key in every
batch, whatever its length. A layer (an operator that meets input and parameters) starts anew from its parameters: what
happened before it, such as which experts a batch has woken, does not change its name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from emscan.trace import fused, higher, spelling, training
from emscan.trace.leaves import Leaves, module_names
from emscan.trace.operators import CONTRACTION, LOOKUP, NORMALIZATION, RECURRENT

# Arguments that say what an operator does rather than how much data it does it to.
_KEYED = frozenset(
    {"dim", "dims", "dim0", "dim1", "axis", "start_dim", "end_dim", "equation", "approximate", "ord", "descending"}
    | {"largest", "return_indices", "is_causal", "reduce", "source", "destination"}
)
_KERNELS = {"_prelu_kernel": "prelu"}  # names of kernels that take the public operator's arguments
LAYERS = CONTRACTION | LOOKUP | NORMALIZATION | frozenset(RECURRENT)
Name = tuple[int, bool]  # key of a computation, and whether parameters and buffers alone went into it
_KEYED_INDEX = frozenset({"select", "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind"})


@functools.lru_cache(maxsize=4096)
def packet_name(func: Any) -> str:
    """Return ``namespace.operator``; an in-place operator has the name of its functional form where one exists."""
    if not hasattr(func, "_schema"):  # a higher-order operator has none of its own
        return f"higher_order.{func.name()}"
    namespace, _, name = func._schema.name.partition("::")
    name = _KERNELS.get(name, name)
    base = name.removesuffix("_")
    if name.endswith("_") and not name.endswith("__") and hasattr(getattr(torch.ops, namespace), base):
        name = base
    return f"{namespace}.{name}"


@functools.lru_cache(maxsize=4096)
def _keyed_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    if not hasattr(func, "_schema"):
        return ()
    indexed = packet_name(func).rpartition(".")[2] in _KEYED_INDEX
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.name in _KEYED or (indexed and argument.name in {"index", "start"})
    )


@functools.lru_cache(maxsize=4096)
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that ``func`` writes to."""
    if not hasattr(func, "_schema") or not func._schema.is_mutable:
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


def _takes_all(_x: Any, _dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> bool:
    """Whether a slice is ``[:]``, which graphs write out where Python code has none."""
    return start in (None, 0) and step == 1 and (end is None or end == sys.maxsize)


def _with_numbers_as_tensors(func: Any, args: Any) -> Any:
    """TorchScript hands over numbers in the place of tensors that hold a size."""
    places = _tensor_arguments(func)
    return [torch.tensor(x) if i in places and isinstance(x, int | float) else x for i, x in enumerate(args)]


@functools.lru_cache(maxsize=4096)
def _tensor_arguments(func: Any) -> frozenset[int]:
    arguments = func._schema.arguments if hasattr(func, "_schema") else ()
    return frozenset(i for i, argument in enumerate(arguments) if str(argument.type) == "Tensor")


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or outputs, in order; dataclasses and objects with fields included. Of a tensor that
    is made of tensors (nested, sharded, quantized ones), these: operators are called on them."""
    if type(tree) is Tensor:
        yield tree
    elif isinstance(tree, Tensor):
        if is_traceable_wrapper_subclass(tree):
            yield from (part for name in tree.__tensor_flatten__()[0] for part in tensors_in(getattr(tree, name)))
        else:
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


class Tracker(TorchDispatchMode):
    """Follow every operator call of one forward pass. Subclasses see calls through ``before`` and ``after``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler for the sake of this mode: 800 modules, 70 MiB and seconds."""
        return False

    supports_higher_order_operators = True

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
        if types and any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of tensors calls operators on those, and they come here again
        if self.leaves.taken_in_training:
            args, kwargs = training.in_evaluation(func, args, kwargs)
        replacement = fused.DECOMPOSITIONS.get(func)
        if replacement is not None:
            with self:
                out = replacement(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if isinstance(func, HigherOrderOperator) and higher.transparent(func):
            with self:
                return higher.unfolded(func, args, kwargs)
        if func is torch.ops.aten.slice.Tensor and _takes_all(*args, **kwargs):
            out = func(*args, **kwargs)
            self._tag(out, *self._name(args[0]))
            self.same(args[0], out)
            return out
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if not inputs:
            args = _with_numbers_as_tensors(func, args)
        names = [self._name(tensor) for tensor in inputs]
        pure = bool(names) and all(own for _, own in names)
        public, seen, named = spelling.public(func, args, kwargs)
        if not pure and any(own for _, own in names) and packet_name(public) in LAYERS:
            names = [name for name in names if name[1]]
        if func is torch.ops.aten.detach.default:
            # factories detach what they made if somebody else still holds it, as a recorder does: no new name
            key = names[0][0]
        else:
            key = hash((public, *self._static(public, seen, named), *(name for name, _ in names)))
        call = self.before(public, key, seen, named, inputs)
        out = _run(func, args, kwargs)
        for position, name in written_arguments(func):
            target = args[position] if position < len(args) else kwargs.get(name)
            for tensor in tensors_in(target):
                self._log_write(tensor, key)
                self._tag(tensor, key, pure)
        outputs = list(tensors_in(out))
        for index, tensor in enumerate(outputs):
            self._tag(tensor, hash((key, index)) if index else key, pure)
        self.after(call, public, key, seen, named, outputs)
        return out

    def _static(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        found: list[Any] = []
        for position, name in _keyed_arguments(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            if not isinstance(value, Tensor):
                found.append(tuple(value) if isinstance(value, list) else value)
        return found

    def same(self, tensor: Tensor, other: Tensor) -> None:
        """See that ``other`` is ``tensor`` over again."""

    def before(self, func: Any, key: int, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """See a call before it runs; what is returned is handed to ``after``."""

    def after(self, call: Any, func: Any, key: int, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """See a call and its outputs after it ran."""


@contextmanager
def module_stack(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that holds, while the model runs, the fully qualified names of the modules being called.

    Global hooks, so that nothing is attached to the user's modules. Submodules of a ScriptModule call no hooks.
    """
    names = module_names(model)
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
