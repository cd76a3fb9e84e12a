"""What is kept of tensors that are too large to keep: enough to verify a row by, a fraction of their size."""

from __future__ import annotations

import torch
from torch import Tensor

_ENTRIES = 1 << 12  # of a tensor
_SCORES = 1 << 14  # of a softmax; of an attention call, a few queries against all keys
_KEYS = 1 << 18  # numbers of the keys of an attention call
_QUERIES, _HEADS, _SAMPLES = 64, 4, 2


def entries(tensor: Tensor) -> Tensor:
    """Return evenly spaced entries, (n,): at the same places in every tensor of one shape, however it lies in memory."""
    step = -(-tensor.numel() // _ENTRIES)
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)] if tensor.dim() else tensor.clone()


def competitions(scores: Tensor, weights: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced competitions of scores and their weights, both (n, K), alternatives along ``axis``."""
    count = scores.shape[axis]
    total = scores.numel() // max(1, count)
    few = min(total, max(4, _SCORES // max(1, count)))
    shape = [size for a, size in enumerate(scores.shape) if a != axis % scores.dim()]
    places = torch.linspace(0, total - 1, few, device=scores.device).long()
    at = torch.unravel_index(places, shape) if shape else ()
    return tuple(t.movedim(axis, -1)[at].reshape(few, count).clone() for t in (scores, weights))  # type: ignore[return-value]


def attention(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return views of the first queries, heads and samples of a call, with all their keys.

    query (..., H, L, E), key (..., G, S, E) with G dividing H, mask broadcastable to (..., H, L, S).
    """
    rank, size = query.dim(), key.shape[-2]
    if rank >= 4:
        shared = query.shape[-3] // max(1, key.shape[-3])
        heads = max(1, min(_HEADS, key.shape[-3], _KEYS // max(1, size * key.shape[-1])))
        if mask is not None and mask.dim() >= 3 and mask.shape[-3] > 1:
            mask = mask[..., : heads * shared, :, :]
        query, key = query[..., : heads * shared, :, :], key[..., :heads, :, :]
    if rank >= 3 and query.shape[0] > _SAMPLES:
        mask = mask[:_SAMPLES] if mask is not None and mask.dim() == rank and mask.shape[0] > 1 else mask
        query, key = query[:_SAMPLES], key[:_SAMPLES]
    few = max(4, min(_QUERIES, _KEYS // max(1, size)))
    if mask is not None and mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = mask[..., :few, :]
    return query[..., :few, :], key, mask
