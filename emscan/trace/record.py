"""Discovery: one forward pass recorded whole, with the numbers, on a few samples."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emscan.trace.dispatch import Leaves, Tracker, module_stack, packet_name, storage_id, tensors_in, written_arguments
from emscan.trace.graph import Call, Trace, Value, substitute, values_in
from emscan.trace.operators import CREATES

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent.parent)
_RANDOM = frozenset(
    f"aten.{name}"
    for name in (
        "rand randn randint randperm rand_like randn_like randint_like normal uniform bernoulli_p exponential random "
        "log_normal cauchy geometric empty empty_like new_empty dropout bernoulli multinomial"
    ).split()
)


class GradMode:
    """Whether the model is inside a ``no_grad`` block of its own, which an inference-mode run does not show otherwise."""

    def __init__(self) -> None:
        self.depth = 0

    @property
    def off(self) -> bool:
        """Inside at least one block."""
        return self.depth > 0


@contextmanager
def grad_mode() -> Iterator[GradMode]:
    """Count the entries and exits of ``torch.no_grad`` while the body runs.

    The class itself is watched: a function mode would see them too, but it changes which operators factories call.
    """
    watch = GradMode()
    enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__

    def entered(block: torch.no_grad) -> None:
        watch.depth += 1
        enter(block)

    def left(block: torch.no_grad, *error: Any) -> None:
        watch.depth -= 1
        leave(block, *error)

    torch.no_grad.__enter__, torch.no_grad.__exit__ = entered, left  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        torch.no_grad.__enter__, torch.no_grad.__exit__ = enter, leave  # type: ignore[method-assign]


class Recorder(Tracker):
    """Build the Trace of one pass. Keeps at most ``budget`` bytes of values."""

    def __init__(self, leaves: Leaves, stack: list[str], grad: GradMode, budget: int) -> None:
        super().__init__(leaves)
        self.trace = Trace()
        self._stack, self._grad, self._budget = stack, grad, budget
        self._values: dict[int, Value] = {}  # id of a tensor -> its latest value; tensors are kept alive below
        self._seen: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._shared: dict[int, list[Value]] = defaultdict(list)  # storage -> values that read it
        self._written: dict[int, list[Value]] = defaultdict(list)

    def value_of(self, tensor: Tensor) -> Value:
        """Return the Value that stands for the present contents of ``tensor``."""
        value = self._values.get(id(tensor))
        if value is None:
            return self._leaf(tensor)
        if tensor.layout == torch.strided:
            written = self._written.get(storage_id(tensor), [])
            seen = self._seen.get(id(tensor), 0)
            if len(written) > seen:
                return self._mutated(tensor, value, written[seen:])
        return value

    def _leaf(self, tensor: Tensor) -> Value:
        kind, name = self.leaves.find(tensor) or ("const", "")
        value = self._new(tensor, self._leaf_name(tensor)[0])
        value.leaf, value.name = kind, name
        # a network without parameters is all arithmetic on its input: energies come from there
        value.param, value.data = kind == "param" or (kind == "input" and self.leaves.bare), kind == "input"
        value.flow = hash(
            (kind, name or value.id, tuple(tensor.shape), tensor.storage_offset() if kind == "param" else 0)
        )
        return value

    def _new(self, tensor: Tensor, key: int, call: Call | None = None, index: int = 0) -> Value:
        value = Value(len(self.trace.values), tuple(tensor.shape), tensor.dtype, key, call, index)
        self.trace.values.append(value)
        self._alive.append(tensor)
        self._values[id(tensor)] = value
        if tensor.layout == torch.strided:
            storage = storage_id(tensor)
            fresh = storage not in self._shared
            size = tensor.untyped_storage().nbytes() if fresh and call is not None else 0
            if size <= self._budget:
                self._budget -= size
                value.tensor = tensor.detach() if tensor.requires_grad else tensor
                self._shared[storage].append(value)
            self._seen[id(tensor)] = len(self._written.get(storage, ()))
        return value

    def _mutated(self, tensor: Tensor, old: Value, writes: list[Value]) -> Value:
        """A tensor whose memory was written through another view: a value made of both."""
        key = self.key_of(tensor)
        call = Call(len(self.trace.calls), "emscan.mutated", None, (old, *writes), {}, [old, *writes], [], key)
        call.module = self._stack[-1] if self._stack else ""
        self._finish(call, [tensor], key)
        return call.out

    def before(self, func: Any, key: int, args: Any, kwargs: Any, inputs: list[Tensor]) -> Call:
        """Record the call's arguments, and keep what it is about to overwrite."""

        def to_value(leaf: Any) -> Any:
            return self.value_of(leaf) if isinstance(leaf, Tensor) else leaf

        new_args, new_kwargs = substitute(tuple(args), to_value), substitute(dict(kwargs), to_value)
        call = Call(
            len(self.trace.calls),
            packet_name(func),
            func,
            new_args,
            new_kwargs,
            [*values_in(new_args), *values_in(new_kwargs)],
            [],
            key,
            self._stack[-1] if self._stack else "",
            _source_line(),
            bool(written_arguments(func)),
            self._grad.off,
        )
        for position, name in written_arguments(func):
            for tensor in tensors_in(args[position] if position < len(args) else kwargs.get(name)):
                self._keep(tensor)
        return call

    def _keep(self, tensor: Tensor) -> None:
        """Copy the contents that earlier values refer to before they are overwritten."""
        if tensor.layout != torch.strided:
            return
        copies: dict[int, Tensor] = {}
        for value in self._shared.pop(storage_id(tensor), []):
            if value.tensor is not None:
                if id(value.tensor) not in copies:
                    copies[id(value.tensor)] = value.tensor.clone()
                value.tensor = copies[id(value.tensor)]

    def after(self, call: Call, func: Any, key: int, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Record the call's outputs."""
        if not outputs and call.in_place:
            outputs = [
                tensor
                for position, name in written_arguments(func)
                for tensor in tensors_in(args[position] if position < len(args) else kwargs.get(name))
            ]
        self._finish(call, outputs, key)
        if call.in_place:
            for tensor, value in zip(outputs, call.outputs, strict=True):
                if tensor.layout == torch.strided:
                    storage = storage_id(tensor)
                    self._written[storage].append(value)
                    self._seen[id(tensor)] = len(self._written[storage])

    def _finish(self, call: Call, outputs: list[Tensor], key: int) -> None:
        self.trace.calls.append(call)
        creates = call.op in CREATES
        flow = hash((call.func, _named(call.args), _named(call.kwargs), call.id if call.op in _RANDOM else 0))
        for value in call.inputs:
            value.users.append(call)
        for index, tensor in enumerate(outputs):
            value = self._new(tensor, hash((key, index)) if index else key, call, index)
            value.flow = hash((flow, index))
            if not creates:
                value.param = any(v.param for v in call.inputs)
                value.data = any(v.data for v in call.inputs)
            call.outputs.append(value)


def _named(tree: Any) -> str:
    """Return a call's arguments as text, every tensor by the whole computation that made it."""
    return repr(substitute(tree, lambda leaf: leaf.flow if isinstance(leaf, Value) else leaf))


def _source_line() -> str | None:
    """Return ``file:line`` of the innermost frame that is neither torch's nor emscan's; None if there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OWN, "<")):
            return f"{name}:{frame.f_lineno}"
        if name.startswith(_OWN) and frame.f_code.co_name == "record":
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, budget: int) -> Trace:
    """Run ``model(*args, **kwargs)`` once and return its Trace; at most ``budget`` bytes of values are kept."""
    inputs = named_inputs(args, kwargs)
    leaves = Leaves(model, inputs)
    with module_stack(model) as stack, torch.inference_mode(), grad_mode() as grad:
        recorder = Recorder(leaves, stack, grad, budget)
        for tensor in inputs.values():
            recorder.trace.inputs.append(recorder.value_of(tensor))
        with recorder:
            out = model(*args, **kwargs)
        trace = recorder.trace
        trace.outputs = [recorder.value_of(tensor) for tensor in tensors_in(out)]
    trace.modules = {name: type(module).__name__ for name, module in model.named_modules()}
    trace.mark_live()
    return trace


def named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Name every tensor of a batch: position for arguments, name for keywords."""
    found: dict[str, Tensor] = {}
    for position, item in enumerate(args):
        for offset, tensor in enumerate(tensors_in(item)):
            found[f"{position}.{offset}" if offset else str(position)] = tensor
    for name, item in kwargs.items():
        for offset, tensor in enumerate(tensors_in(item)):
            found[f"{name}.{offset}" if offset else name] = tensor
    return found
