"""A competition that no row accounts for is never passed over as clean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emscan.classify import gates
from emscan.classify.coverage import account
from emscan.classify.regions import Region
from emscan.trace.record import record
from tests.classify.conftest import look_at

X = torch.randn(5, 4)


def recorded(model: nn.Module):
    return record(model, (X,), {}, budget=1 << 20)


def test_a_live_normalization_in_no_row_is_unclassified() -> None:
    trace = recorded(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Softmax(-1)))
    found = account(trace, [])
    assert {unknown.op for unknown in found.unclassified} == {"aten.softmax", "aten.tanh"}
    assert all(count.calls == count.unclassified == 1 for count in found.calls)


def test_one_alternative_competes_with_nobody() -> None:
    assert not account(recorded(nn.Sequential(nn.Linear(4, 1), nn.Softmax(-1))), []).unclassified


def test_what_reaches_no_output_is_control() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            z = self.fc(x)
            z.softmax(-1)
            return z

    (count,) = account(recorded(Unused()), []).calls
    assert (count.op, count.control) == ("aten.softmax", 1)


def test_arithmetic_that_cannot_be_read_is_not_called_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel for single numbers")

    monkeypatch.setattr(gates, "_KNOWN", {})
    monkeypatch.setattr(Region, "function", unreadable)
    found = look_at(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.randn(8, 4),))
    assert [(u.op, u.calls) for u in found.coverage.unclassified] == [("aten.relu", 1)]
