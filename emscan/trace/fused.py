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
_PADDED = "_emscan_padding"
_LSTM = 2  # torch's number for the mode of a recurrent kernel


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
    """Attention over (N, T, E) as the module computes it off its fast path.

    ``mask`` hides: (T, S) if ``mask_type`` is 0, (N, S) if 1, else (N, H, T, S).
    """
    if query is key and key is value:
        q = k = v = query.transpose(0, 1)
    else:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    hidden = mask if mask is None or mask.dtype == torch.bool else mask != 0
    by_key = hidden if mask_type == 1 else None
    mixed, weights = F.multi_head_attention_forward(
        q, k, v, embed_dim, num_head, qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias,
        training=False, key_padding_mask=by_key, need_weights=need_weights,
        attn_mask=None if hidden is by_key or hidden is None else hidden.reshape(-1, *hidden.shape[-2:]).squeeze(0),
        average_attn_weights=average_attn_weights,
    )  # fmt: skip
    return mixed.transpose(0, 1), weights


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
        masked = {"mask": mask, "mask_type": mask_type} if padded is None else {"mask": padded, "mask_type": 1}
        mixed: Tensor = native_multi_head_attention(
            x, x, x, embed_dim, num_heads, *weights, need_weights=False, **masked
        )[0]
        return mixed

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    padded = getattr(src, _PADDED, None)
    if norm_first:
        src = src + attend(norm_1(src))
        out = src + feed(norm_2(src))
    else:
        src = norm_1(src + attend(src))
        out = norm_2(src + feed(src))
    return _padded(out, padded) if padded is not None else out


@_stands_for(torch.ops.aten._addmm_activation.default)
def addmm_activation(
    self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> Tensor:
    """A matrix product and its gate."""
    hidden = torch.addmm(self, mat1, mat2, beta=beta, alpha=alpha)
    return F.gelu(hidden, approximate="tanh" if hidden.is_cuda else "none") if use_gelu else F.relu(hidden)


@_stands_for(torch.ops.aten._add_relu.Tensor)
def add_relu(self: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    """A residual sum and its gate."""
    return F.relu(torch.add(self, other, alpha=alpha))


@_stands_for(torch.ops.aten.cudnn_convolution_relu.default)
def convolution_relu(
    self: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """A convolution and its gate."""
    zeros = [0] * len(stride)
    return F.relu(torch.convolution(self, weight, bias, stride, padding, dilation, False, zeros, groups))


@_stands_for(torch.ops.aten.cudnn_convolution_add_relu.default)
def convolution_add_relu(
    self: Tensor, weight: Tensor, z: Tensor, alpha: float | None, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """A convolution, a residual sum and their gate."""
    zeros = [0] * len(stride)
    hidden = torch.convolution(self, weight, bias, stride, padding, dilation, False, zeros, groups)
    return F.relu(torch.add(hidden, z, alpha=1.0 if alpha is None else alpha))


@_stands_for(torch.ops.aten._masked_softmax.default)
def masked_softmax(self: Tensor, mask: Tensor, dim: int | None = None, mask_type: int | None = None) -> Tensor:
    """A softmax over what ``mask`` does not hide: (T, S) if ``mask_type`` is 0, (N, S) if 1, else like the scores."""
    hidden = mask[:, None, None, :] if mask_type == 1 and mask.dim() == 2 else mask
    return self.masked_fill(hidden, -torch.inf).softmax(-1 if dim is None else dim)


@_stands_for(torch.ops.aten.mkldnn_rnn_layer.default)
def mkldnn_rnn_layer(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, h: Tensor, c: Tensor, *rest: Any
) -> Any:
    """One direction of one layer of an LSTM over (T, N, E), by oneDNN; ``rest`` tells of the LSTM that it is a part of."""
    reverse, batch_sizes, mode, _, _, has_biases, *_ = rest
    if mode != _LSTM or batch_sizes:
        return NotImplemented
    weights = [w0, w1, w2, w3] if has_biases else [w0, w1]
    start = [state.view(1, *state.shape[-2:]) for state in (h, c)]
    steps = x.flip(0) if reverse else x
    out, last, cell = torch.ops.aten.lstm.input(steps, start, weights, has_biases, 1, 0.0, False, False, False)
    return out.flip(0) if reverse else out, last.view_as(h), cell.view_as(c), x.new_empty(0)


@_stands_for(torch.ops.aten._nested_tensor_from_mask.default)
def nested_tensor_from_mask(t: Tensor, mask: Tensor, _mask_check: bool = True) -> Tensor:
    """Sequences without their padding, in front of fused encoder layers: here they keep it, with the mask beside it."""
    return _padded(t.clone(), ~mask)


@_stands_for(torch.ops.aten.to_padded_tensor.default)
def to_padded_tensor(self: Tensor, padding: float, _output_size: Any = None) -> Any:
    """Fill the padding of what ``nested_tensor_from_mask`` made; any other nested tensor is the operator's own affair."""
    padded = getattr(self, _PADDED, None)
    if padded is None:
        return NotImplemented
    return self.masked_fill(padded.view(*padded.shape, *[1] * (self.dim() - 2)), padding)


def _padded(x: Tensor, padding: Tensor) -> Tensor:
    """Note where ``x`` (N, T, ...) is padded: ``padding`` (N, T)."""
    setattr(x, _PADDED, padding)
    return x
