"""Evidence for attention in one operator: its own weights, which are its output for one-hot values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emscan.classify.posterior_error import compare
from emscan.trace import excerpts
from emscan.trace.graph import Call, Value

_KEYS = 4096


def errors(call: Call) -> tuple[float, float, float] | None:
    """Return (sum error, gradient error, largest score that matters) on a few queries, heads and samples.

    Beyond 4,096 keys, the weights of some of them and the sum over all.
    """
    excerpt = _excerpt(call)
    if excerpt is None:
        return None
    query, key, bias = excerpt
    causal, scale = bool(call.arg("is_causal", False)), call.arg("scale")
    grouped = query.dim() >= 3 and query.shape[-3] // max(1, key.shape[-3]) if query.dim() >= 4 else 1
    size = key.shape[-2]
    some = torch.arange(size, device=key.device)
    if size > _KEYS:
        some = torch.linspace(0, size - 1, max(2, query.shape[-1] - 1), device=key.device).long()
    values = key.new_zeros(size, len(some) + 1)
    values[some, torch.arange(len(some), device=key.device)] = 1
    values[:, -1] = 1  # what the weights sum to
    values = values.expand(*key.shape[:-1], len(some) + 1)
    r = torch.nn.functional.scaled_dot_product_attention(
        query, key, values, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped > 1
    )
    r = torch.nan_to_num(r)
    keys = key.repeat_interleave(grouped, -3) if grouped > 1 else key
    scores = query.double() @ keys.double().mT * (scale if scale is not None else query.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.double()
    return compare(r[..., :-1], scores, (-1,), total=r[..., -1], some=some)


def _excerpt(call: Call) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return queries, keys and mask, as they were kept when the call was recorded or from its whole operands."""
    if call.excerpt:
        query, key, mask = call.excerpt
        return (query, key, mask) if query is not None and key is not None else None
    query, key, given = call.inputs[0].tensor, call.inputs[1].tensor, call.arg("attn_mask")
    if query is None or key is None:
        return None
    return excerpts.attention(query, key, given.tensor if isinstance(given, Value) else None)
