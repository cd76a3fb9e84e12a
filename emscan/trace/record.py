"""Discovery: one forward pass recorded whole, with the numbers, on a few samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emscan.shapeless import is_shapeless
from emscan.trace import excerpts
from emscan.trace.dispatch import Tracker, module_stack, packet_name, tensors_in, written_arguments
from emscan.trace.grad import GradMode, grad_mode, without_gradients
from emscan.trace.graph import Call, Trace, Value, substitute, values_in
from emscan.trace.leaves import Leaves, plain_name
from emscan.trace.operators import CREATES, LIKE, SDPA, SOFTMAX

_SMALL = 1 << 14  # bytes of a tensor that is kept in any case
_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent.parent)
_RANDOM = frozenset(
    f"aten.{name}"
    for name in (
        "rand randn randint randperm rand_like randn_like randint_like normal uniform bernoulli_p exponential random "
        "log_normal cauchy geometric empty empty_like new_empty dropout bernoulli multinomial"
    ).split()
)


@dataclass(slots=True)
class _Mark:
    """The value that a tensor stands for; ``seen``: how many writes to its memory that takes in."""

    owner: object
    value: Value
    seen: int = 0


@dataclass(slots=True)
class _Memory:
    """Memory that tensors share: whether it is kept, the values that are read from it, and those written to it."""

    owner: object
    kept: bool | None = None
    values: list[Value] = field(default_factory=list)
    written: list[Value] = field(default_factory=list)


class Recorder(Tracker):
    """Build the Trace of one pass. Keeps at most ``budget`` bytes of values."""

    def __init__(self, leaves: Leaves, stack: list[str], grad: GradMode, budget: int) -> None:
        super().__init__(leaves)
        self.trace = Trace()
        self._stack, self._grad, self._budget = stack, grad, budget
        self._leaves: dict[int, _Mark] = {}  # by id of a tensor that no call has made,
        self._alive: list[Tensor] = []  # which is kept alive for it; others carry their mark themselves
        self._memories: list[_Memory] = []

    def value_of(self, tensor: Tensor) -> Value:
        """Return the Value that stands for the present contents of ``tensor``."""
        mark = self._mark(tensor)
        if mark is None:
            if tensor.is_mkldnn and self.leaves.find(tensor) is None:  # kernels of optimized TorchScript run unseen
                return self._unseen("mkldnn.unseen", tensor, [v for v in self.trace.values if v.data][-1:])
            return self._leaf(tensor)
        if tensor.layout == torch.strided:
            written = self._memory(tensor).written
            if len(written) > mark.seen:
                return self._mutated(tensor, mark.value, written[mark.seen :])
        return mark.value

    def _mark(self, tensor: Tensor) -> _Mark | None:
        mark = self._leaves.get(id(tensor)) or getattr(tensor, "_emscan_value", None)
        return mark if mark is not None and mark.owner is self._token else None

    def _remember(self, tensor: Tensor, value: Value, *, leaf: bool = False) -> None:
        """Let a tensor stand for a value, in the state in which its memory is now."""
        flat = tensor.layout == torch.strided and not tensor.is_nested
        mark = _Mark(self._token, value, len(self._memory(tensor).written) if flat else 0)
        if leaf or id(tensor) in self._leaves:
            self._leaves[id(tensor)] = mark
            self._alive.append(tensor)
        else:
            tensor._emscan_value = mark  # type: ignore[attr-defined]

    def _memory(self, tensor: Tensor) -> _Memory:
        """Return what is known of the memory that a tensor looks at; it goes when the memory goes."""
        storage = tensor.untyped_storage()
        memory = getattr(storage, "_emscan_memory", None)
        if memory is None or memory.owner is not self._token:
            memory = _Memory(self._token)
            storage._emscan_memory = memory  # type: ignore[attr-defined]
            self._memories.append(memory)
        return memory

    def forget(self) -> None:
        """Let go of what hangs on memory that lives on, of parameters."""
        for memory in self._memories:
            memory.values.clear()
            memory.written.clear()

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
        call = Call(len(self.trace.calls), op, None, tuple(inputs), {}, inputs, [], key)
        self._finish(call, [tensor], key)
        return call.out

    def outputs(self, out: Any) -> list[Value]:
        """Return the values that the model handed out. A model that leaves torch on its way (for NumPy) hands out
        tensors that depend on nothing: then they come from whatever led nowhere."""
        tensors = list(tensors_in(out))
        values = [self.value_of(tensor) for tensor in tensors]
        if any(value.data or value.param for value in values):
            return values
        loose = [v for v in self.trace.values if v.data and v.param and v.floating and not v.users]
        return [self._unseen("numpy.unseen", tensor, loose) for tensor in tensors[:1] if loose] or values

    def _new(
        self, tensor: Tensor, key: int, call: Call | None = None, index: int = 0, *, constant: bool = False
    ) -> Value:
        value = Value(len(self.trace.values), _shape(tensor), tensor.dtype, key, call, index)
        self.trace.values.append(value)
        self._remember(tensor, value, leaf=call is None)
        if tensor.layout == torch.strided and not tensor.is_nested:
            if not is_shapeless(tensor):
                self._keep_numbers(tensor, value, constant=constant or call is None)
        elif tensor.is_mkldnn:
            value.tensor = tensor.to_dense()
        return value

    def _keep_numbers(self, tensor: Tensor, value: Value, *, constant: bool) -> None:
        """Keep what fits the budget; what no input reaches, masks and thresholds, is needed whatever its size."""
        memory = self._memory(tensor)
        if memory.kept is None:
            size = 0 if constant else tensor.untyped_storage().nbytes()
            memory.kept = size <= self._budget or size <= _SMALL
            self._budget -= size if memory.kept else 0
        if memory.kept:
            value.tensor = tensor.detach() if tensor.requires_grad else tensor
            memory.values.append(value)
            return
        value.dropped = True
        if value.floating and tensor.numel():
            value.few = excerpts.entries(tensor.detach())

    def _mutated(self, tensor: Tensor, old: Value, writes: list[Value]) -> Value:
        """A tensor whose memory was written through another view: a value made of both."""
        key = self.key_of(tensor)
        call = Call(len(self.trace.calls), "emscan.mutated", None, (old, *writes), {}, [old, *writes], [], key)
        call.module = self._stack[-1] if self._stack else ""
        self._finish(call, [tensor], key)
        return call.out

    def same(self, tensor: Tensor, other: Tensor) -> None:
        """Let ``other`` stand for the same value."""
        self._remember(other, self.value_of(tensor))

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
        memory = self._memory(tensor)
        values, memory.values = memory.values, []
        for value in values:
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
        self._excerpt(call, func, args, kwargs, outputs)
        if call.in_place:
            for tensor, value in zip(outputs, call.outputs, strict=True):
                if tensor.layout == torch.strided:
                    self._memory(tensor).written.append(value)
                    self._remember(tensor, value)

    def _excerpt(self, call: Call, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Keep what the evidence of a competition needs, where its operands or its output were too large to keep."""
        if call.op not in SDPA | SOFTMAX or is_shapeless(outputs[0]):
            return
        if not any(value.dropped for value in (*call.inputs, *call.outputs)):
            return
        named = {**{a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}, **kwargs}
        if call.op in SDPA:
            some = excerpts.attention(named["query"], named["key"], named.get("attn_mask"))
            call.excerpt = tuple(t.detach().clone() if t is not None else None for t in some)
        elif not call.in_place and outputs[0].numel():
            call.excerpt = excerpts.competitions(named[next(iter(named))].detach(), outputs[0].detach(), named["dim"])

    def _finish(self, call: Call, outputs: list[Tensor], key: int) -> None:
        self.trace.calls.append(call)
        creates = call.op in CREATES
        flow = hash((call.func, _named(call.args), _named(call.kwargs), call.id if call.op in _RANDOM else 0))
        for value in call.inputs:
            value.users.append(call)
        numbers = [] if creates else _numbers(call)
        param, data = any(v.param for v in numbers), any(v.data for v in numbers)
        for index, tensor in enumerate(outputs):
            value = self._new(tensor, hash((key, index)) if index else key, call, index, constant=not data)
            value.flow = hash((flow, index))
            value.param, value.data = param, data
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
        for value, tensor in zip(trace.outputs, tensors_in(out), strict=False):
            if value.dropped and value.shape == tuple(tensor.shape):
                value.tensor, value.dropped = tensor.detach(), False  # it is there in any case
    recorder.forget()
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
