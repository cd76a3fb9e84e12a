"""Whether numbers cannot be negative, from the operators alone: for runs without weights."""

from __future__ import annotations

import torch

from emscan.classify.flow import INDEXERS, SCATTERS
from emscan.trace.graph import Call, Value
from emscan.trace.operators import CONTRACTION, JOIN, PASS, RANKING, SOFTMAX, VIEW

_ALWAYS = frozenset(
    f"aten.{name}"
    for name in (
        "exp exp2 special_exp2 sigmoid special_expit softplus relu relu6 abs absolute square sqrt rsqrt hardsigmoid erfc "
        "cosh acosh norm linalg_vector_norm var std cdist pairwise_distance one_hot dist zeros ones zeros_like ones_like "
        "new_zeros new_ones rand rand_like eye"
    ).split()
)
# Nonnegative where everything that goes in is.
_IF_ALL = (
    VIEW | PASS | JOIN | INDEXERS | SCATTERS | CONTRACTION | RANKING | frozenset({"emscan.mutated"})
    | frozenset(
        f"aten.{name}"
        for name in (
            "add mul multiply div divide true_divide sum mean cumsum prod amax amin max min maximum minimum index_add "
            "scatter_reduce reciprocal masked_fill where index_copy copy sinh tanh erf log1p expm1 avg_pool1d avg_pool2d "
            "clamp_max median fill zero"
        ).split()
    )
)  # fmt: skip
_NUMBERS = frozenset(f"aten.{name}" for name in "add mul div masked_fill where pow full full_like new_full".split())


def nonnegative(value: Value, depth: int = 40) -> bool:
    """Whether every entry is at least 0, by its numbers where there are any."""
    if value.tensor is not None:
        tensor = value.tensor
        return tensor.numel() > 0 and not tensor.is_complex() and float(tensor.min()) >= 0
    if value.dtype == torch.bool:
        return True
    call = value.call
    if call is None or depth == 0:
        return False
    if call.op in _ALWAYS or (call.op in SOFTMAX and "log" not in call.op):
        return True
    if call.op in {"aten.clamp", "aten.clamp_min", "aten.clip"}:
        low = call.arg("min")
        return (isinstance(low, int | float) and low >= 0) or nonnegative(call.inputs[0], depth - 1)
    if call.op in {"aten.pow", "aten.float_power"}:
        power = call.arg("exponent")
        return (isinstance(power, int | float) and power % 2 == 0) or nonnegative(call.inputs[0], depth - 1)
    if call.op not in _IF_ALL or not _plain_numbers(call):
        return False
    return bool(call.inputs) and all(
        nonnegative(v, depth - 1) for v in call.inputs if v.floating or v.dtype == torch.bool
    )


def _plain_numbers(call: Call) -> bool:
    """Whether the numbers that a call adds, fills in or multiplies by are not negative."""
    if call.op not in _NUMBERS:
        return True
    return all(a >= 0 for a in (*call.args, *call.kwargs.values()) if isinstance(a, int | float))
