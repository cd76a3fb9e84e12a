"""The tensors that exist before the run: parameters, buffers and inputs, found by identity of storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from emscan.state import keeps_mode
from emscan.trace.training import taken_in_training

Kind = Literal["param", "buffer"]
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def plain_name(name: str) -> str:
    """Return a fully qualified name without what wrappers (torch.compile's, checkpointing's) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_state(model: nn.Module) -> Iterator[tuple[Kind, str, Tensor]]:
    """Yield (kind, name, tensor) of all parameters and buffers, those of frozen TorchScript included; tied ones once."""
    modules = list(model.named_modules())
    seen: set[tuple[Any, ...]] = set()
    for table, kind in (("_parameters", "param"), ("_buffers", "buffer")):
        for prefix, module in modules:
            for name, tensor in getattr(module, table).items():
                memory = _memory(tensor) if tensor is not None else None
                if memory is not None and memory not in seen:
                    seen.add(memory)
                    yield kind, _joined(prefix, name), tensor  # type: ignore[misc]
    for prefix, module in modules:  # a codebook that was worked out once and kept is a plain attribute
        for name, tensor in vars(module).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and _memory(tensor) not in seen:
                seen.add(_memory(tensor))
                yield "buffer", _joined(prefix, name), tensor
    for prefix, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            for frozen_kind, name, tensor in _frozen(module):
                yield frozen_kind, _joined(prefix, name), tensor


def _joined(prefix: str, name: str) -> str:
    return plain_name(f"{prefix}.{name}" if prefix else name)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two parameters that are one have in common: a loaded program may hold a tied one under two names."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or is_traceable_wrapper_subclass(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _frozen(module: torch.jit.ScriptModule) -> Iterator[tuple[Kind, str, Tensor]]:
    """Yield what freezing has turned into constants of the graph, or left in parts that Python does not show.

    Constants of a dtype that a parameter can have are taken for parameters. They keep their names until the module is
    saved; then they are numbered.
    """
    if hasattr(module, "training") or not module._c._has_method("forward"):
        return
    yield from _attributes(module._c, "")
    number = 0
    graph: Any = module.graph
    for node in graph.findAllNodes("prim::Constant"):
        owner, _, name = node.output().debugName().partition(".")
        name = name.removesuffix("_fused_bn")  # a batch norm folded into the weight
        value = node.output().toIValue()
        for place, tensor in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                own = f"{name}{place}" if isinstance(value, list | tuple) else name
                yield "param", own if owner == "self" else f"constant{number}", tensor
                number += 1


def _attributes(part: Any, prefix: str) -> Iterator[tuple[Kind, str, Tensor]]:
    parameters: Any = torch._C.ParameterDict(part)
    buffers: Any = torch._C.BufferDict(part)
    parts: Any = torch._C.ModuleDict(part)
    for name, tensor in parameters.items():
        yield "param", prefix + name, tensor
    for name, tensor in buffers.items():
        yield "buffer", prefix + name, tensor
    for name, inner in parts.items():
        yield from _attributes(inner, f"{prefix}{name}.")


def module_names(model: nn.Module) -> dict[int, str]:
    """Return the names of all modules by identity; the parts of an exported graph are torch's, not the model's."""
    found: dict[int, str] = {}
    graphs: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in graphs) and isinstance(module, torch.fx.GraphModule):
            continue
        if isinstance(module, torch.fx.GraphModule) and keeps_mode(module):
            graphs.append(f"{name}." if name else "")
        found[id(module)] = plain_name(name)
    return found


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of all parameters, in order."""
    return [name for kind, name, _ in named_state(model) if kind == "param"]


class Leaves:
    """The tensors that exist before the run: parameters, buffers and inputs, found by identity of storage."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.by_id: dict[int, tuple[str, str]] = {}
        self.by_storage: dict[int, tuple[str, str]] = {}
        self._alive: list[Tensor] = []
        self.bare = True  # no parameter at all
        self.taken_in_training = taken_in_training(model)
        for kind, name, tensor in named_state(model):
            self.bare = self.bare and kind != "param"
            self._add(kind, name, tensor)
        for name, tensor in inputs.items():
            self._add("input", name, tensor)

    def _add(self, kind: str, name: str, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self.by_id.setdefault(id(tensor), (kind, name))
        if is_traceable_wrapper_subclass(tensor):
            for part in tensor.__tensor_flatten__()[0]:
                self._add(kind, name, getattr(tensor, part))
            return
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
