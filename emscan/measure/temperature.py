"""How near a competition is to the zero-temperature limit: its entropy with all energies halved and doubled.

With w = exp(s - max s) and inverse temperature b: Z_b = sum w^b, H_b = log Z_b - b sum w^b (s - max s) / Z_b; w^(1/2)
and w^2 need no further exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emscan.measure.chunks import THIRD
from emscan.report.document import Temperature

_SCORES = 1 << 22  # scores of a row that are followed; beyond them, the first competitions stand for all
_LEAST = 256  # competitions


class Scaled:
    """Streamed mean of H / ln(alternatives seen) at half and at double the energies, over the first competitions.

    Competitions with a single alternative in sight are left out.
    """

    def __init__(self, count: int) -> None:
        self.limit = max(_LEAST, _SCORES // max(1, count))
        self.met = 0  # competitions looked at
        self.measured = 0  # with at least two alternatives
        self.half, self.double = 0.0, 0.0

    @property
    def wants(self) -> bool:
        """Whether more competitions are looked at."""
        return self.met < self.limit

    def update(self, weight: Tensor, below: Tensor, seen: Tensor | None) -> None:
        """See weights w = exp(below) (n, K), ``below`` finite where w is not 0 and at most 0; ``seen``: (n,) counts."""
        left = self.limit - self.met
        if left <= 0 or not len(weight):
            return
        weight, below, seen = weight[:left], below[:left], seen[:left] if seen is not None else None
        self.met += len(weight)
        width = weight.shape[-1]
        most = 1 / math.log(width) if width > 1 else 0.0
        share: Tensor | float = most
        if seen is not None:
            share = torch.where(seen >= 2, 1 / seen.clamp(min=2).to(weight.dtype).log(), 0.0)
        self.measured += int((seen >= 2).sum()) if seen is not None else len(weight) * (width > 1)
        power = torch.sqrt(weight, out=THIRD.room(weight))
        self.half += self._mean(power, below, 0.5, share)
        self.double += self._mean(torch.mul(weight, weight, out=power), below, 2.0, share)

    @staticmethod
    def _mean(power: Tensor, below: Tensor, scale: float, share: Tensor | float) -> float:
        total = power.sum(-1)
        h = total.log() - power.mul_(below).sum(-1).mul_(scale) / total
        return float((h.clamp_(min=0) * share).sum(dtype=torch.float64))

    def merge(self, other: Scaled) -> None:
        """Add what another probe shard has shown, if both fit into the limit; else keep what saw more."""
        if self.met + other.met <= self.limit:
            self.met, self.measured = self.met + other.met, self.measured + other.measured
            self.half, self.double = self.half + other.half, self.double + other.double
        elif other.met > self.met:
            self.met, self.measured, self.half, self.double = other.met, other.measured, other.half, other.double

    def summary(self, measured: int) -> Temperature | None:
        """Return the means; ``measured``: competitions of the whole probe that have two alternatives or more."""
        if not self.measured:
            return None
        part = self.measured if self.measured < measured else None
        return Temperature(self.half / self.measured, self.double / self.measured, part)
