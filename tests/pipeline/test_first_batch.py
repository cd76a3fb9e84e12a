"""A batch that discovery has run whole is measured from what it kept: the report is the same as after a second run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan
from emscan.discovery import Audit
from tests.classify import basic_cases, more_cases


class InPlace(nn.Module):
    """Overwrites what earlier rows were found in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu_()
        z = self.second(h)
        out = torch.softmax(z, -1)
        z.tanh_()
        h.zero_()
        return out + z


class Noisy(nn.Module):
    """Draws random numbers in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(self.layer(x), hard=False)


class Looping(nn.Module):
    """One layer many times over, and a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.memory = nn.Linear(6, 6), nn.LSTM(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.layer(x))
        return self.memory(x[:, None])[0]


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[nn.Module, Any]], **options: Any) -> list[Any]:
    """Return the report as it is, and as it is where every batch is run under the taps."""
    found = []
    for feeding in (True, False):
        with monkeypatch.context() as patch:
            if not feeding:
                patch.setattr(Audit, "_feed", lambda *_: False)
            torch.manual_seed(0)
            model, inputs = make()
            found.append(emscan.audit(model.eval(), inputs, **options).to_dict())
    return found


CASES = {**basic_cases.CASES, **more_cases.CASES}


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_truth_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, _, objective = CASES[name]
    fed, run = both(monkeypatch, builder, objective=objective)
    assert fed == run


@pytest.mark.parametrize("network", [InPlace, Noisy, Looping])
@pytest.mark.parametrize("batch_size", [3, 4, None])
def test_overwritten_random_and_repeated(network: Any, batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fed, run = both(monkeypatch, lambda: (network(), torch.randn(12, 6)), batch_size=batch_size)
    assert fed == run


def test_a_single_batch_runs_once() -> None:
    runs = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(len(x))
            return self.layer(x).relu()

    emscan.audit(Counted().eval(), torch.randn(4, 6))
    assert runs == [4]
    runs.clear()
    emscan.audit(Counted().eval(), torch.randn(9, 6), batch_size=3)
    assert runs == [3, 3, 3]


def test_what_was_too_large_to_keep_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fed, run = both(monkeypatch, lambda: (Looping(), torch.randn(4, 6)))
    monkeypatch.setattr("emscan.discovery._KEPT", 100)
    again, _ = both(monkeypatch, lambda: (Looping(), torch.randn(4, 6)))
    for a, b, c in zip(fed["layers"], run["layers"], again["layers"], strict=True):
        assert a["components"] == b["components"] == c["components"]
        assert a["responsibility"] == b["responsibility"] == c["responsibility"]
