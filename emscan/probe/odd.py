"""What is odd about a probe that runs all the same: NaN, pixels that nobody normalized."""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.probe.arguments import Arguments
from emscan.probe.batch import Batch
from emscan.probe.recipe import KNOWN, Recipe, recipe
from emscan.probe.watch import named_tensors


class Odd:
    """Looks at every batch of a pass; says each thing once. ``folder``: where the model lies, None where unknown."""

    def __init__(self, module: nn.Module, folder: Path | None) -> None:
        self._module = module
        self._said: set[str] = set()
        self._pixels: Recipe | None = None
        with contextlib.suppress(ProbeError):  # a broken configuration matters to a folder of images alone
            self._pixels = recipe(folder, Arguments(None, KNOWN, ""))

    def look(self, batch: Batch, before: int) -> list[str]:
        """Return what is new; ``before``: the samples of the pass before this batch."""
        floats = {n: t for n, t in named_tensors(self._module, batch).items() if t.is_floating_point() and t.numel()}
        found = []
        for name, tensor in floats.items():
            if tensor.is_meta:
                continue
            if name not in self._said and bool(tensor.sum().isnan()) and bool(tensor.isnan().any()):
                self._said.add(name)
                found.append(_nan(name, tensor, batch.samples, before))
            if not before and f"pixels of {name}" not in self._said:
                self._said.add(f"pixels of {name}")
                found += self._unnormalized(name, tensor)
        return found

    def _unnormalized(self, name: str, tensor: Tensor) -> list[str]:
        """Normalized pixels have both signs: a batch without a negative value was not normalized."""
        said = self._pixels
        if said is None or said.mean is None or tensor.ndim != 4 or tensor.shape[1] not in (1, 3, 4):
            return []
        low, high = float(tensor.min()), float(tensor.max())
        if not 0 <= low < high:
            return []
        steps = said.describe(None).partition(", ")[2]
        return [
            f"the probe's {name} holds values from {low:.3g} to {high:.3g}; the model's images are made so: {steps}"
        ]


def _nan(name: str, tensor: Tensor, samples: int, before: int) -> str:
    where = ""
    if tensor.ndim and tensor.shape[0] == samples:
        rows = tensor.isnan().reshape(samples, -1).any(dim=1)
        where = f", first in sample {before + int(rows.int().argmax()):,} (from 0)"
    return f"the probe's {name} holds NaN{where}: what is computed from it counts as not finite; replace it or leave it out"
