"""Fused operators that hide sites, as the operators that they stand for.

Only where a model calls the fused operator itself (TorchScript, an exported program): eager modules take their
unfused path while emscan traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def _stands_for(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if op in DECOMPOSITIONS:
            raise ValueError(f"{op} is registered twice")
        DECOMPOSITIONS[op] = function
        return function

    return register


@_stands_for(torch.ops.aten._native_multi_head_attention.default)
def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention over (N, T, E); ``mask`` hides: (T, S) if ``mask_type`` is 0, (N, S) if 1, else (N, H, T, S)."""
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    else:
        biases = qkv_bias.chunk(3) if qkv_bias is not None else (None, None, None)
        weights = qkv_weight.chunk(3)
        projected = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    q, k, v = (part.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for part in projected)
    visible = _visible(mask, mask_type)
    if need_weights:
        scores = q @ k.transpose(-2, -1) * (embed_dim // num_head) ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        attention = scores.softmax(-1)
        mixed = attention @ v
        weights_out = attention.mean(1) if average_attn_weights else attention
    else:
        mixed, weights_out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible), None
    return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights_out


def _visible(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    if mask is None:
        return None
    hidden = mask if mask.dtype == torch.bool else mask != 0
    if mask_type == 1:
        hidden = hidden[:, None, None, :]
    return ~hidden


@_stands_for(torch.ops.aten._transformer_encoder_layer_fwd.default)
def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """One encoder layer over (N, T, E)."""

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        mixed: Tensor = native_multi_head_attention(
            x, x, x, embed_dim, num_heads, *weights, mask=mask, need_weights=False, mask_type=mask_type
        )[0]
        return mixed

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed(src))
