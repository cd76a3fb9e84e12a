"""Which parametrized operation produced a value, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Iterable

from emscan.trace.graph import Call, Trace, Value, values_in
from emscan.trace.operators import CONTRACTION, LOOKUP, NORMALIZATION, PASS, RECURRENT, VIEW, pointwise

_LABELS = {
    "aten.linear": "Linear", "aten.matmul": "Linear", "aten.mm": "Linear", "aten.addmm": "Linear", "aten.mv": "Linear",
    "aten.einsum": "Linear", "aten._grouped_mm": "Linear", "aten.bmm": "Linear", "aten.baddbmm": "Linear",
    "aten.embedding": "Embedding",
    "aten.conv1d": "Conv1d", "aten.conv2d": "Conv2d", "aten.conv3d": "Conv3d", "aten.conv_transpose1d": "ConvTranspose1d",
    "aten.conv_transpose2d": "ConvTranspose2d", "aten.conv_transpose3d": "ConvTranspose3d", "aten.cdist": "Distance",
    "aten.layer_norm": "LayerNorm", "aten.batch_norm": "BatchNorm", "aten.group_norm": "GroupNorm",
    "aten.rms_norm": "RMSNorm", "aten.instance_norm": "InstanceNorm", "aten.bilinear": "Bilinear", "aten.sub": "Distance",
    "aten.lstm": "LSTM", "aten.gru": "GRU", "aten.lstm_cell": "LSTMCell", "aten.gru_cell": "GRUCell",
    "aten.rnn_tanh": "RNN", "aten.rnn_relu": "RNN", "aten.rnn_tanh_cell": "RNNCell", "aten.rnn_relu_cell": "RNNCell",
}  # fmt: skip


_ADDED_FIRST = frozenset(f"aten.{name}" for name in "addmm baddbmm addbmm addmv".split())
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.[^.]+$")


def label(call: Call) -> str:
    """Return how a parametrized operator is called in the composition of a row."""
    return _LABELS.get(call.op, "Parameter" if pointwise(call.op) else call.op.rpartition(".")[2])


def parameters(call: Call) -> tuple[str, ...]:
    """Return the names of the parameters that enter a call, directly or through arithmetic on parameters alone."""
    found: dict[str, None] = {}
    bias = bias_of(call)
    for value in [*_weights(call), *(bias.inputs if bias is not None else ())]:
        stack = [value]
        while stack:
            item = stack.pop()
            if item.leaf == "param":
                found[item.name] = None
            elif item.call is not None and item.call is not call and item.param and not item.data:
                stack.extend(item.call.inputs)
    return tuple(found)


def tables(call: Call) -> tuple[str, ...]:
    """Return the names of the parameters and buffers that enter a call without the input's having part in them."""
    found: dict[str, None] = {}
    stack = [v for v in call.inputs if not v.data]
    while stack:
        item = stack.pop()
        if item.leaf in {"param", "buffer"}:
            found[item.name] = None
        elif item.call is not None:
            stack.extend(v for v in item.call.inputs if not v.data)
    return tuple(found)


def _weights(call: Call) -> list[Value]:
    """Return the operands that can be a layer's own: a cell's input may be a learned start, made of parameters alone."""
    if call.op in _ADDED_FIRST:
        return [*call.inputs[1:], call.inputs[0]]
    if call.op not in RECURRENT:
        return call.inputs
    held = [call.arg(name) for name in ("params", "w_ih", "w_hh", "b_ih", "b_hh")]
    return list(values_in([item for item in held if item is not None]))


def bias_of(call: Call) -> Call | None:
    """Return the addition of parameters alone that directly follows a product with parameters: its bias."""
    if call.op not in CONTRACTION or not call.outputs or not any(v.param and not v.data for v in call.inputs):
        return None
    value = call.out
    for _ in range(4):
        if len(value.users) != 1 or not value.users[0].outputs:
            return None
        user = value.users[0]
        if user.op == "aten.add":
            others = [v for v in user.inputs if v is not value]
            plain = (
                len(others) == 1 and others[0].param and not others[0].data and len(others[0].shape) <= len(value.shape)
            )
            return user if plain and user.arg("alpha", 1) == 1 and user.out.shape == value.shape else None
        if not (user.op in VIEW or user.op in PASS):
            return None
        value = user.out
    return None


def owns(call: Call) -> bool:
    """Whether a call computes values from input with parameters of its own."""
    takes = any(v.param and not v.data for v in call.inputs) and any(v.data for v in call.inputs)
    return takes and (call.op in CONTRACTION or call.op in LOOKUP or call.op in RECURRENT)


def owner_of(value: Value) -> Call | None:
    """Return the nearest parametrized operation that produced ``value``; contractions before scalings and norms."""
    queue, seen = [value], {value.id}
    fallback: Call | None = None
    for item in queue:
        call = item.call
        if call is None or len(seen) > 2000:
            continue
        if owns(call):
            return call
        if call.op == "emscan.mutated" and len(call.inputs) > 1:
            parents = [*call.inputs[1:], call.inputs[0]]
        else:
            parents = list(call.inputs)
        scaled = any(v.param and not v.data for v in parents) and (call.op in NORMALIZATION or pointwise(call.op))
        if (
            fallback is None
            and scaled
            and (call.op in NORMALIZATION or call.op == "aten.sub" or any(v.data for v in parents))
        ):
            fallback = call
        if fallback is call and not any(v.param and v.data for v in parents):
            return call  # parameters meet the raw input here: nothing nearer produced the values
        for parent in parents:
            if parent.id not in seen and parent.param:
                seen.add(parent.id)
                queue.append(parent)
    return fallback


def norms_between(value: Value, owner: Call) -> list[str]:
    """Return the labels of the normalizations between an owner and a value, in order."""
    found: list[str] = []
    item: Value | None = value
    for _ in range(30):
        call = item.call if item is not None else None
        if call is None or call is owner:
            break
        if call.op in NORMALIZATION:
            found.append(label(call))
        item = next((v for v in call.inputs if v.data and v.param), None)
    return found[::-1]


def _holder(name: str) -> str:
    """Return the module that a parameter belongs to; a parametrized weight belongs to the layer that uses it."""
    return _PARAMETRIZED.sub("", name.rpartition(".")[0])


class Names:
    """Row names: the module whose parameters all feed one call, else the parameter itself."""

    def __init__(self, trace: Trace, all_parameters: Iterable[str]) -> None:
        self._direct: dict[str, set[str]] = {}
        for name in all_parameters:
            self._direct.setdefault(_holder(name), set()).add(name)

    def of(self, names: tuple[str, ...]) -> str:
        """Return the name of the row that owns these parameters."""
        if not names:
            return ""
        holder = _holder(names[0])
        whole = self._direct.get(holder, set()) <= set(names)
        own = holder or ("(model)" if len(names) > 1 or names[0] == "weight" else names[0])
        return own if whole else names[0]

    def common(self, names: Iterable[str]) -> str:
        """Return the module that holds several owners (queries and keys): their common path, else their names joined."""
        owners = list(dict.fromkeys(name for name in names if name))
        if not owners:
            return ""
        if len(owners) == 1:
            return owners[0]
        paths = [name.split(".") for name in owners]
        shared = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return ".".join(shared) or ", ".join(owners)
