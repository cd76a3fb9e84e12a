"""Trace a small network and classify it, as the pipeline does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from emscan.classify import Classification, classify
from emscan.state import undisturbed
from emscan.trace.record import record


def look_at(model: nn.Module, inputs: tuple[Any, ...], objective: str = "auto", targets: Any = None) -> Classification:
    model.eval()
    with undisturbed(model, 0):
        trace = record(model, inputs, {}, budget=1 << 28)
    names = [name for name, _ in model.named_parameters()]
    return classify(trace, names, objective_name=objective, targets=targets)


def rows_of(found: Classification) -> list[tuple[Any, ...]]:
    return sorted((row.site.verdict, row.mechanism, row.site.count) for row in found.rows if row.site)


def seeded(builder: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, inputs = builder()
    return model, inputs


def same_rows(got: list[tuple], expected: list[tuple]) -> bool:
    """Whether both hold the same rows; an expected count of None stands for any count."""
    left = Counter(got)
    for want in sorted(expected, key=lambda row: row[2] is None):
        hit = next((row for row in left if row[:2] == want[:2] and want[2] in (None, row[2])), None)
        if hit is None:
            return False
        left[hit] -= 1
        left += Counter()
    return not left
