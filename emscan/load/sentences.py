"""The modules of sentence-transformers as plain torch modules: pooling of token vectors, and what follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")  # in the order of their concatenation
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU)
}


class SentenceModel(nn.Module):
    """A transformer, its pooling, and layers on the pooled vector, named by their numbers as in the saved folder."""

    def __init__(self, transformer: nn.Module, others: list[nn.Module]) -> None:
        super().__init__()
        for index, module in enumerate([transformer, *others]):
            self.add_module(str(index), module)
        self.config: Any = transformer.config  # which inputs fit is read from it

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors (B, D) of ``input_ids`` (B, T); ``attention_mask`` (B, T) is 1 where there is a token."""
        transformer, *others = self.children()
        states = transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for module in others:
            states = module(states, mask) if isinstance(module, Pooling) else module(states)
        assert isinstance(states, Tensor)
        return states


class Pooling(nn.Module):
    """One vector for each text from those of its tokens, in every one of ``modes``, side by side."""

    def __init__(self, modes: list[str]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return (B, M D) of ``states`` (B, T, D) and ``mask`` (B, T)."""
        return torch.cat([self._one(mode, states, mask) for mode in self.modes], 1)

    def _one(self, mode: str, states: Tensor, mask: Tensor) -> Tensor:
        wide = mask.unsqueeze(-1).to(states.dtype)
        if mode == "cls":
            return states[:, 0]
        if mode == "max":
            return states.masked_fill(wide == 0, -1e9).amax(1)
        if mode == "lasttoken":
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            return states[torch.arange(len(states), device=states.device), last]
        if mode == "weightedmean":
            wide = wide * torch.arange(1, mask.shape[1] + 1, dtype=states.dtype, device=states.device)[None, :, None]
        total = wide.sum(1).clamp(min=1e-9)
        return (states * wide).sum(1) / (total.sqrt() if mode == "mean_sqrt_len" else total)


class Normalize(nn.Module):
    """Vectors of length one."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return ``vectors`` (B, D) over their norms."""
        return F.normalize(vectors, dim=1)


class Dense(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.activation_function = activation

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (B, O) of ``vectors`` (B, I)."""
        output = self.activation_function(self.linear(vectors))
        assert isinstance(output, Tensor)
        return output
