"""Accuracy, confidence and expected calibration error against a recomputation in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import emscan
from emscan.measure.calibration import CalibrationBins


def recomputed(confidence: Tensor, right: Tensor, bins: int = 15) -> tuple[float, float, float]:
    """Accuracy, mean confidence and ECE, bin by bin as the definition has it: (lower, upper]."""
    c, a = confidence.double().numpy(), right.double().numpy()
    edges = np.linspace(0, 1, bins + 1)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (c > low) & (c <= high)
        if inside.any():
            error += inside.mean() * abs(a[inside].mean() - c[inside].mean())
    return float(a.mean()), float(c.mean()), float(error)


def of_classes(z: Tensor, y: Tensor) -> tuple[float, float, float]:
    r = z.double().softmax(-1)
    named = y >= 0
    return recomputed(r.amax(-1)[named], (r.argmax(-1) == y)[named])


def close(found: object, expected: tuple[float, float, float]) -> None:
    got = (found.accuracy, found.confidence, found.error)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(2, 40), st.integers(0, 99), st.floats(0.1, 8), st.integers(1, 5))
def test_classes_in_any_pieces(n: int, k: int, seed: int, scale: float, pieces: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator).double() * scale
    y = torch.randint(-1, k, (n,), generator=generator)
    y[0] = 0
    parts = [CalibrationBins() for _ in range(pieces)]
    for index, (part, targets) in enumerate(zip(z.tensor_split(pieces * 2), y.tensor_split(pieces * 2), strict=True)):
        parts[index % pieces].update_classes(part, targets)
    for other in parts[1:]:
        parts[0].merge(other)
    whole = CalibrationBins()
    whole.update_classes(z, y)
    whole.settle()
    parts[0].settle()
    assert parts[0].count.equal(whole.count)
    assert parts[0].right.equal(whole.right)
    assert whole.result().targets == int((y >= 0).sum())
    close(parts[0].result(), of_classes(z, y))


@pytest.mark.parametrize("form", ["scores", "log", "probabilities"])
@pytest.mark.parametrize("axis", [1, -1])
def test_forms_and_axes(form: str, axis: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 5, 7, 9, dtype=torch.float64) * 3
    y = torch.randint(0, z.shape[axis], z.movedim(axis, -1).shape[:-1])
    values = {"scores": z, "log": z.log_softmax(axis), "probabilities": z.softmax(axis)}[form]
    bins = CalibrationBins()
    bins.update_classes(values, y, axis, form)
    close(bins.result(), of_classes(z.movedim(axis, -1).flatten(0, -2), y.flatten()))


def test_a_wide_vocabulary_and_many_rows() -> None:
    torch.manual_seed(1)
    z = torch.randn(50, 6000) * 4
    y = torch.where(torch.rand(50) < 0.5, z.argmax(-1), 3)
    bins = CalibrationBins()
    bins.update_classes(z, y)
    found, expected = bins.result(), of_classes(z, y)
    assert (found.accuracy, found.confidence, found.error) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["odds", "sides"])
def test_sides(form: str) -> None:
    torch.manual_seed(2)
    u, y = torch.randn(300, 4, dtype=torch.float64) * 2, torch.rand(300, 4)
    y[:5] = -1
    bins = CalibrationBins()
    bins.update_sides(u if form == "odds" else u.sigmoid(), y, form)
    r, named = u.sigmoid(), y >= 0
    assert bins.result().targets == 295 * 4
    close(bins.result(), recomputed(torch.maximum(r, 1 - r)[named], ((r > 0.5) == (y > 0.5))[named]))


def test_what_is_not_finite_or_names_no_class_is_left_out() -> None:
    bins = CalibrationBins()
    z = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, 3.0], [1.0, 0.0]])
    bins.update_classes(z, torch.tensor([1, 0, -100, 5]))
    assert bins.result().targets == 1
    assert bins.result().accuracy == 1.0
    assert CalibrationBins().result() is None


def test_certainty_and_even_odds_are_in_their_bins() -> None:
    bins = CalibrationBins()
    bins.update_classes(torch.tensor([[200.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]))
    bins.settle()
    assert bins.count.nonzero().flatten().tolist() == [7, 14]


def test_numbers_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="3 targets for 2"):
        CalibrationBins().update_classes(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="3 targets for 2"):
        CalibrationBins().update_sides(torch.zeros(2), torch.zeros(3))


# ---- in an audit --------------------------------------------------------------------------------
NET = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
X = torch.randn(700, 6, generator=torch.Generator().manual_seed(5)) * 3
Y = torch.randint(0, 5, (700,), generator=torch.Generator().manual_seed(6))


def audited(net: nn.Module, x: Tensor, y: Tensor, **options: object):
    rows = emscan.audit(net, x, targets=y, **options).layers
    (found,) = (row for row in rows if row.responsibility is not None and row.responsibility.calibration is not None)
    return found


@pytest.mark.parametrize("tail", [nn.Identity(), nn.Softmax(-1), nn.LogSoftmax(-1)], ids=["logits", "softmax", "log"])
@pytest.mark.parametrize("size", [1, 64, 700])
def test_the_output_row_of_an_audit(tail: nn.Module, size: int) -> None:
    row = audited(nn.Sequential(NET, tail), X, Y, objective="cross-entropy", batch_size=size)
    found = row.responsibility.calibration
    with torch.no_grad():
        expected = of_classes(NET(X), Y)
    assert found.targets == 700
    assert (found.accuracy, found.confidence, found.error) == pytest.approx(expected, rel=1e-5)


def test_the_output_row_of_a_segmentation() -> None:
    net, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(5, 3, 8, 8)
    y = torch.randint(0, 4, (5, 8, 8))
    y[:, 0] = -100
    found = audited(net, x, y, batch_size=2).responsibility.calibration
    with torch.no_grad():
        expected = of_classes(net(x).movedim(1, -1).flatten(0, -2), y.flatten())
    assert found.targets == 5 * 7 * 8
    assert (found.accuracy, found.confidence, found.error) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tail", [nn.Identity(), nn.Sigmoid()], ids=["logits", "sigmoid"])
def test_the_output_row_of_binary_labels(tail: nn.Module) -> None:
    y = torch.randint(0, 2, (700, 5), generator=torch.Generator().manual_seed(1)).float()
    found = audited(nn.Sequential(NET, tail), X, y, objective="bce", batch_size=130).responsibility.calibration
    with torch.no_grad():
        r = NET(X).double().sigmoid()
    expected = recomputed(torch.maximum(r, 1 - r).flatten(), ((r > 0.5) == (y > 0.5)).flatten())
    assert (found.accuracy, found.confidence, found.error) == pytest.approx(expected, rel=1e-5)


def test_without_targets_there_is_none() -> None:
    report = emscan.audit(NET, X, objective="cross-entropy")
    assert all(row.responsibility is None or row.responsibility.calibration is None for row in report.layers)


def test_batches_without_a_fitting_target_are_left_out() -> None:
    halves = [(X[:100], Y[:100]), (X[100:], Y[100:])]
    whole = audited(NET, X, Y).responsibility.calibration
    report = emscan.audit(NET, halves)
    found = next(
        r.responsibility.calibration for r in report.layers if r.responsibility and r.responsibility.calibration
    )
    assert found.targets == 700
    assert found.error == pytest.approx(whole.error, rel=1e-6)


def test_an_overconfident_output_gets_a_note_and_a_sound_one_does_not() -> None:
    torch.manual_seed(0)
    z = torch.randn(4000, 4) * 2
    y = torch.multinomial(z.softmax(-1), 1)[:, 0]  # calibrated by construction
    for scale, rules in ((1.0, False), (6.0, True)):
        net = nn.Linear(4, 4, bias=False)
        nn.init.eye_(net.weight)
        with torch.no_grad():
            net.weight *= scale
        report = emscan.audit(net, z, targets=y)
        assert ("EM211" in {f.rule for f in report.findings}) is rules
    few = emscan.audit(net, z[:20], targets=y[:20])
    error = next(r.responsibility.calibration.error for r in few.layers if r.responsibility)
    assert error > 0.1
    assert "EM211" not in {f.rule for f in few.findings}  # so few could be chance
