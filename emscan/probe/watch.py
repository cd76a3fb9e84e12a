"""Watching a run for the operator that raises, and for what the probe's own tensors are used for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emscan.probe.batch import Batch, map_tensors
from emscan.probe.signature import signature

# Operators that hand on the numbers of their first argument: what comes out is still the probe's.
_PASSING = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze transpose permute t expand expand_as contiguous clone detach to "
    "_to_copy alias slice select narrow movedim swapaxes view_as type_as lift_fresh long int float index_select "
    "constant_pad_nd pad flip chunk split unbind".split()
)
LOOKUPS = frozenset({"embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"})


@dataclass(frozen=True)
class Failure:
    """The operator that raised: its arguments, and the name of the probe's tensor that each one is, if any."""

    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    names: dict[int, str]  # by position
    error: Exception

    def led_to(self, error: BaseException) -> bool:
        """Whether ``error`` is what the operator raised, or was raised while that was handled."""
        seen: BaseException | None = error
        while seen is not None and seen is not self.error:
            seen = seen.__cause__ or seen.__context__
        return seen is not None

    def tensor(self, position: int) -> Tensor | None:
        """Return the argument at a position, None where it is no tensor."""
        value = self.args[position] if position < len(self.args) else None
        return value if isinstance(value, Tensor) else None


class Watch(TorchDispatchMode):
    """Follow the probe's tensors through one run.

    ``failure``: the last operator that raised; the model may have gone on. ``looked_up``: the probe's name of ids ->
    the smallest table that they index, and its rows.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler for the sake of this mode."""
        return False

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.failure: Failure | None = None
        self.went_on = False  # whether an operator ran after the one that raised
        self.looked_up: dict[str, tuple[int, Tensor]] = {}
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id may be given again once its tensor is gone
        for name, tensor in inputs.items():
            self._call(tensor, name)

    def name(self, tensor: Tensor) -> str | None:
        """Return the probe's name of a tensor, None for what the model computed."""
        return self._names.get(id(tensor))

    def reason(self, module: nn.Module, error: BaseException) -> Failure | None:
        """Return the operator that led to ``error``; TorchScript raises an exception of its own for it."""
        if self.failure is None:
            return None
        scripted = any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())
        return self.failure if self.failure.led_to(error) or (scripted and not self.went_on) else None

    def _call(self, tensor: Tensor, name: str) -> None:
        self._names.setdefault(id(tensor), name)  # one tensor may be given twice
        self._alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func._schema.name.partition("::")[2] if hasattr(func, "_schema") else ""
        names = {
            position: self._names[id(value)]
            for position, value in enumerate(args)
            if isinstance(value, Tensor) and id(value) in self._names
        }
        if op in LOOKUPS and 1 in names and isinstance(args[0], Tensor):
            before = self.looked_up.get(names[1])
            if before is None or args[0].shape[0] < before[0]:
                self.looked_up[names[1]] = (args[0].shape[0], args[0])
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self.failure, self.went_on = Failure(op, list(args), kwargs, names, error), False
            raise
        self.went_on = True
        if 0 in names and op.rstrip("_") in _PASSING:
            map_tensors(lambda made: self._call(made, names[0]), out)
        return out


def named_tensors(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by the names of forward's parameters."""
    parameters = [parameter.name for parameter in signature(module).parameters]
    found: dict[str, Tensor] = {}
    for position, value in enumerate(batch.args):
        name = parameters[position] if position < len(parameters) else f"argument {position + 1}"
        _collect(found, name, value)
    for name, value in batch.kwargs.items():
        _collect(found, name, value)
    return found


def _collect(found: dict[str, Tensor], name: str, value: Any) -> None:
    tensors: list[Tensor] = []
    map_tensors(tensors.append, value)
    for number, tensor in enumerate(tensors):
        found[name if not number else f"{name}[{number}]"] = tensor


def owners(module: nn.Module) -> Callable[[Tensor], str | None]:
    """Return a function that names a parameter or buffer by where it is, None for any other tensor."""
    names: dict[int, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        names[id(tensor)] = name
        if not tensor.is_meta and tensor.numel() and tensor.layout == torch.strided:
            places[(tensor.device, tensor.data_ptr())] = name

    def owner(tensor: Tensor) -> str | None:
        if id(tensor) in names:
            return names[id(tensor)]
        if tensor.is_meta or tensor.layout != torch.strided:
            return None
        return places.get((tensor.device, tensor.data_ptr()))

    return owner


def run_watched(module: nn.Module, batch: Batch) -> tuple[Watch, Exception | None]:
    """Run the model once under a watch; what it raises is returned."""
    watch = Watch(named_tensors(module, batch))
    try:
        with torch.inference_mode(), watch:
            module(*batch.args, **batch.kwargs)
    except Exception as error:  # whatever a forward raises on what it was not made for
        return watch, error
    return watch, None


def raising_modules(error: BaseException) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yield the modules whose own code the exception passed, innermost first, and the tensors in its variables."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        values = frame.f_locals
        if isinstance(values.get("self"), nn.Module):
            yield values["self"], {name: value for name, value in values.items() if isinstance(value, Tensor)}
