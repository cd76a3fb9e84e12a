"""Kernels that torch calls below its public operators, as the public operator that they compute.

A decomposed program calls ``_softmax`` where the model said ``softmax``. The kernel runs; the trace says which operator
it is, with that operator's arguments, so that nothing else has to know both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

aten = torch.ops.aten
# public argument -> argument of the kernel, where the names differ
_RENAMED = {
    "attn_mask": "attn_bias",
    "num_groups": "group",
    "eps": "epsilon",
    "momentum": "exponential_average_factor",
    "input": "self",
}
_SDPA = aten.scaled_dot_product_attention.default
_BATCH_NORM = aten.batch_norm.default
_PUBLIC: dict[str, Any] = {
    "_softmax": aten.softmax.int,
    "_log_softmax": aten.log_softmax.int,
    "native_layer_norm": aten.layer_norm.default,
    "native_group_norm": aten.group_norm.default,
    "_fused_rms_norm": aten.rms_norm.default,
    "native_batch_norm": _BATCH_NORM,
    "_native_batch_norm_legit": _BATCH_NORM,
    "_native_batch_norm_legit_no_training": _BATCH_NORM,
    "_native_batch_norm_legit_functional": _BATCH_NORM,
    "_batch_norm_no_update": _BATCH_NORM,
    "cudnn_batch_norm": _BATCH_NORM,
    "miopen_batch_norm": _BATCH_NORM,
    "max_pool2d_with_indices": aten.max_pool2d.default,
    "max_pool3d_with_indices": aten.max_pool3d.default,
    "_adaptive_avg_pool2d": aten.adaptive_avg_pool2d.default,
    "_adaptive_avg_pool3d": aten.adaptive_avg_pool3d.default,
    "_weight_norm_interface": aten._weight_norm.default,
    "native_dropout": aten.dropout.default,
    "_cdist_forward": aten.cdist.default,
    "_euclidean_dist": aten.cdist.default,
    "_embedding_bag": aten.embedding_bag.default,
    "_embedding_bag_forward_only": aten.embedding_bag.default,
    "log_sigmoid_forward": aten.log_sigmoid.default,
    "linalg_matmul": aten.matmul.default,
    "mkldnn_linear": aten.linear.default,
    "_scaled_dot_product_flash_attention": _SDPA,
    "_scaled_dot_product_flash_attention_for_cpu": _SDPA,
    "_scaled_dot_product_efficient_attention": _SDPA,
    "_scaled_dot_product_cudnn_attention": _SDPA,
    "_scaled_dot_product_attention_math": _SDPA,
    "_scaled_dot_product_fused_attention_overrideable": _SDPA,
}
_CONVOLUTIONS = frozenset(
    "convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution miopen_convolution thnn_conv2d "
    "_slow_conv2d_forward slow_conv3d slow_conv3d_forward conv_depthwise3d _conv_depthwise2d _convolution_mode "
    "cudnn_convolution_transpose miopen_convolution_transpose".split()
)
_PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_PADDED_BY_NAME = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def public(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Return the public operator that ``func`` computes, with its arguments; the call itself where it is public."""
    kernel = _kernel(func)
    if kernel is None:
        return func, args, kwargs
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    if kernel in _CONVOLUTIONS:
        table = _TRANSPOSED if given.get("transposed", "transpose" in kernel) else _PLAIN
        table = _PADDED_BY_NAME if isinstance(given.get("padding"), str) else table
        place = given["weight"].dim() - 3
        return _call(table[place], given) if 0 <= place < len(table) else (func, args, kwargs)
    if kernel == "index_put":
        return _segment_sum(func, args, kwargs, given)
    if kernel in {"_softmax", "_log_softmax"}:
        given["dtype"] = torch.float32 if given.pop("half_to_float") else None
    return _call(_PUBLIC[kernel], given)


@functools.lru_cache(maxsize=4096)
def _kernel(func: Any) -> str | None:
    namespace, _, name = func._schema.name.partition("::") if hasattr(func, "_schema") else ("", "", "")
    if namespace != "aten" or func._schema.is_mutable:
        return None
    return name if name in _PUBLIC or name in _CONVOLUTIONS or name == "index_put" else None


def _segment_sum(func: Any, args: Any, kwargs: Any, given: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Decomposed programs add rows up with ``index_put(accumulate=True)``."""
    into, indices, rows = given["self"], given["indices"], given["values"]
    axis = len(indices) - 1
    alone = given.get("accumulate", False) and all(index is None for index in indices[:axis])
    if not alone or indices[axis].dim() != 1 or indices[axis].dtype == torch.bool or rows.dim() != into.dim():
        return func, args, kwargs
    return aten.index_add.default, (into, axis, indices[axis], rows), {}


def _call(operator: Any, given: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Fill the arguments of ``operator`` by name."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in operator._schema.arguments:
        name = argument.name if argument.name in given else _RENAMED.get(argument.name, argument.name)
        missing = False if str(argument.type) == "bool" else None
        default = argument.default_value if argument.has_default_value() else missing
        value = given.get(name, default)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return operator, tuple(args), kwargs
