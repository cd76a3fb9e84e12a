"""Discovery: one forward pass recorded whole, with the numbers, on a few samples."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emscan.shapeless import is_shapeless
from emscan.trace.dispatch import Tracker, module_stack, packet_name, tensors_in, written_arguments
from emscan.trace.grad import GradMode, grad_mode, without_gradients
from emscan.trace.graph import Call, Trace, Value, substitute, values_in
from emscan.trace.leaves import Leaves, plain_name, storage_id
from emscan.trace.operators import CREATES, LIKE

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent.parent)
_RANDOM = frozenset(
    f"aten.{name}"
    for name in (
        "rand randn randint randperm rand_like randn_like randint_like normal uniform bernoulli_p exponential random "
        "log_normal cauchy geometric empty empty_like new_empty dropout bernoulli multinomial"
    ).split()
)


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
            if tensor.is_mkldnn and self.leaves.find(tensor) is None:  # kernels of optimized TorchScript run unseen
                return self._unseen("mkldnn.unseen", tensor, [v for v in self.trace.values if v.data][-1:])
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
        value.flow = hash((kind, name or value.id, value.shape, tensor.storage_offset() if kind == "param" else 0))
        return value

    def _unseen(self, op: str, tensor: Tensor, read: list[Value]) -> Value:
        """A tensor that no operator made: an unknown one's, with weights that nobody knows, on ``read``."""
        weights = Value(len(self.trace.values), (), tensor.dtype, hash(op), leaf="param", param=True)
        self.trace.values.append(weights)
        inputs = [weights, *read]
        key = hash((op, len(self.trace.calls)))
        self._finish(Call(len(self.trace.calls), op, None, tuple(inputs), {}, inputs, [], key), [tensor], key)
        return self._values[id(tensor)]

    def outputs(self, out: Any) -> list[Value]:
        """Return the values that the model handed out. A model that leaves torch on its way (for NumPy) hands out
        tensors that depend on nothing: then they come from whatever led nowhere."""
        tensors = list(tensors_in(out))
        values = [self.value_of(tensor) for tensor in tensors]
        if any(value.data or value.param for value in values):
            return values
        loose = [v for v in self.trace.values if v.data and v.param and v.floating and not v.users]
        return [self._unseen("numpy.unseen", tensor, loose) for tensor in tensors[:1] if loose] or values

    def _new(self, tensor: Tensor, key: int, call: Call | None = None, index: int = 0) -> Value:
        value = Value(len(self.trace.values), _shape(tensor), tensor.dtype, key, call, index)
        self.trace.values.append(value)
        self._alive.append(tensor)
        self._values[id(tensor)] = value
        if tensor.layout == torch.strided and not tensor.is_nested:
            storage = storage_id(tensor)
            fresh = storage not in self._shared
            size = tensor.untyped_storage().nbytes() if fresh and call is not None else 0
            if size <= self._budget and not is_shapeless(tensor):
                self._budget -= size
                value.tensor = tensor.detach() if tensor.requires_grad else tensor
                self._shared[storage].append(value)
            self._seen[id(tensor)] = len(self._written.get(storage, ()))
        elif tensor.is_mkldnn:
            value.tensor = tensor.to_dense()
        return value

    def _mutated(self, tensor: Tensor, old: Value, writes: list[Value]) -> Value:
        """A tensor whose memory was written through another view: a value made of both."""
        key = self.key_of(tensor)
        call = Call(len(self.trace.calls), "emscan.mutated", None, (old, *writes), {}, [old, *writes], [], key)
        call.module = self._stack[-1] if self._stack else ""
        self._finish(call, [tensor], key)
        return call.out

    def same(self, tensor: Tensor, other: Tensor) -> None:
        """Let ``other`` stand for the same value."""
        value = self.value_of(tensor)
        self._alive.append(other)
        self._values[id(other)] = value
        if other.layout == torch.strided and not other.is_nested:
            self._seen[id(other)] = len(self._written.get(storage_id(other), ()))

    def before(self, func: Any, key: int, args: Any, kwargs: Any, inputs: list[Tensor]) -> Call:
        """Record the call's arguments, and keep what it is about to overwrite."""

        def to_value(leaf: Any) -> Any:
            return self.value_of(leaf) if isinstance(leaf, Tensor) else leaf

        new_args, new_kwargs = substitute(tuple(args), to_value), substitute(dict(kwargs), to_value)
        name = packet_name(func)
        if any(tensor.is_nested for tensor in inputs):
            name = f"nested.{name.rpartition('.')[2]}"  # no rule holds for it: it ends up among the unclassified
        call = Call(
            len(self.trace.calls),
            name,
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
                numbers = _numbers(call)
                value.param = any(v.param for v in numbers)
                value.data = any(v.data for v in numbers)
            call.outputs.append(value)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape; of a nested tensor, the shape that it would have with padding."""
    if not tensor.is_nested:
        return tuple(tensor.shape)
    sizes = tensor._nested_tensor_size()
    return len(sizes), *sizes.amax(0).tolist()


def _numbers(call: Call) -> list[Value]:
    """Return the operands whose numbers an output is made of: not those that lend a shape, or are overwritten whole."""
    if call.op in LIKE:
        return call.inputs[:1]
    return call.inputs[1:] if call.op == "aten.copy" and len(call.inputs) > 1 else call.inputs


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
    with module_stack(model) as stack, without_gradients(model), grad_mode(model) as grad:
        recorder = Recorder(leaves, stack, grad, budget)
        for tensor in inputs.values():
            recorder.trace.inputs.append(recorder.value_of(tensor))
        with recorder:
            out = model(*args, **kwargs)
        trace = recorder.trace
        trace.outputs = recorder.outputs(out)
    trace.modules = {plain_name(name): type(module).__name__ for name, module in model.named_modules()}
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
