"""Operators that call functions of their own (``torch.cond``, flex attention): run so that what they call is seen."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator

# What these do is in the functions that they are given or in operators that they call, never in a kernel.
_DENSE = frozenset(
    "while_loop map_impl scan associative_scan hints_wrapper flex_attention auto_functionalized auto_functionalized_v2 "
    "out_dtype run_const_graph wrap wrap_with_set_grad_enabled wrap_with_autocast wrap_activation_checkpoint "
    "tag_activation_checkpoint dynamo_bypassing_wrapper foreach_map".split()
)


@functools.lru_cache(maxsize=256)
def transparent(func: Any) -> bool:
    """Whether ``func`` is a higher-order operator that ``unfolded`` can run operator by operator."""
    if not isinstance(func, HigherOrderOperator):
        return False
    return func.name() in _BY_HAND or (
        func.name() in _DENSE and DispatchKey.CompositeExplicitAutograd in getattr(func, "py_kernels", ())
    )


def unfolded(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a transparent higher-order operator under the modes that are active."""
    by_hand = _BY_HAND.get(func.name())
    if by_hand is not None:
        return by_hand(*args, **kwargs)
    return func.py_kernels[DispatchKey.CompositeExplicitAutograd](*args, **kwargs)


def _cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _scan(combine_fn: Any, init: Any, xs: Any, additional_inputs: Any = ()) -> Any:
    """Stack what the steps hand out; torch's own form scatters it into a blank, which hides where it came from."""
    carry, steps = list(init), []
    for index in range(xs[0].shape[0] if xs else 0):
        out = combine_fn(*carry, *(x.select(0, index) for x in xs), *additional_inputs)
        carry = list(out[: len(carry)])
        steps.append(out[len(carry) :])
    return *carry, *(torch.stack(column) for column in zip(*steps, strict=True))


def _subgraph(subgraph: Any, _identifier: Any, *operands: Any) -> Any:
    return subgraph(list(operands)) if getattr(subgraph, "_boxed_call", False) else subgraph(*operands)


def _strict(function: Any, operands: Any) -> Any:
    return function(*operands)


# Torch's own implementations of these refuse to run under a mode.
_BY_HAND: dict[str, Any] = {"cond": _cond, "scan": _scan, "invoke_subgraph": _subgraph, "strict_mode": _strict}
