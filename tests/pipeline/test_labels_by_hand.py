"""A negative log-likelihood that the model looks up itself, in every spelling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan


class Lookup(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.spelling = spelling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        log = F.log_softmax(self.head(x), -1)
        rows = torch.arange(len(y))
        if self.spelling == "gather":
            return -log.gather(1, y[:, None]).mean()
        if self.spelling == "range":
            return -log[range(len(y)), y].mean()
        if self.spelling == "by time":
            return -log.unflatten(0, (2, -1))[
                torch.arange(2)[:, None], rows[: len(y) // 2], y.unflatten(0, (2, -1))
            ].mean()
        return -log[rows.flip(0) if self.spelling == "others" else rows, y].mean()


@pytest.mark.parametrize("spelling", ["gather", "index", "range", "by time"])
def test_cross_entropy_by_hand_is_named_verified_and_calibrated(spelling: str) -> None:
    torch.manual_seed(0)
    model, x, y = Lookup(spelling), torch.randn(30, 5), torch.randint(0, 4, (30,))
    report = emscan.audit(model, (x, y), batch_size=30)
    (row,) = [layer for layer in report.layers if layer.verdict == "em"]
    assert row.composition == "Linear + Softmax + Cross-Entropy"
    assert row.alternatives is not None
    assert row.alternatives.kind == "classes"
    assert report.probe.objective == "cross-entropy (computed by the model)"
    assert row.responsibility is not None
    found = row.responsibility.calibration
    assert found is not None
    right = (model.head(x).argmax(-1) == y).double().mean()
    assert (found.targets, found.accuracy) == (30, pytest.approx(float(right)))


def test_the_labels_of_other_rows_are_no_targets() -> None:
    report = emscan.audit(Lookup("others"), (torch.randn(30, 5), torch.randint(0, 4, (30,))), batch_size=30)
    assert [layer.composition for layer in report.layers if layer.verdict == "em"] == ["Linear + LogSoftmax"]
