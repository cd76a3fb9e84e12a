"""Variance and redundancy of components against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emscan.measure import moments as module
from emscan.measure.moments import CORRELATED, Moments


def filled(*parts: torch.Tensor, axis: int = -1) -> Moments:
    moments = Moments(parts[0].shape[axis])
    for part in parts:
        moments.update(part, axis)
    return moments


def redundancy(values: np.ndarray) -> float:
    k = values.shape[1]
    correlation = np.corrcoef(values, rowvar=False)
    return float(((correlation**2).sum() - k) / (k * (k - 1)))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_and_redundancy_equal_numpy(offset: float, dtype: torch.dtype) -> None:
    values = (torch.randn(3000, 8) @ torch.randn(8, 8) + offset).to(dtype)
    moments = filled(*values.split(700))
    exact = values.double().numpy()
    assert moments.variance is not None
    np.testing.assert_allclose(moments.variance.numpy(), exact.var(0), rtol=1e-4)
    assert moments.redundancy == pytest.approx(redundancy(exact), rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(2, 6), st.integers(0, 1000))
def test_merging_and_batches_equal_one_pass(cut: int, k: int, seed: int) -> None:
    values = torch.randn(201, k, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    values[cut:] += 4  # shards around different means, each in several batches
    whole, merged = filled(values), filled(*values[:cut].split(3))
    merged.merge(filled(*values[cut:].split(5)))
    for other in (merged, filled(values[:cut], values[cut:])):
        assert other.samples == whole.samples
        torch.testing.assert_close(other.variance, whole.variance, rtol=1e-4, atol=1e-9)
        assert other.redundancy == pytest.approx(whole.redundancy, rel=1e-3, abs=1e-6)


def first_redundancy(values: np.ndarray, n: int) -> float:
    return redundancy(values[:n])


@pytest.mark.parametrize("count", [CORRELATED + 1, 300])
def test_many_components_correlate_over_the_first_competitions(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "_PRODUCTS", 0)  # then it is 2 K of them
    values = torch.randn(2 * count + 150, 40) @ torch.randn(40, count) + torch.randn(count) * 50
    exact = values.double().numpy()
    for size in (64, 100, len(values)):
        moments = filled(*values.split(size))
        np.testing.assert_allclose(moments.variance, exact.var(0), rtol=1e-4)
        assert moments.correlated == 2 * count
        assert moments.redundancy == pytest.approx(first_redundancy(exact, 2 * count), rel=1e-4)
        assert moments.pairs.products is None  # given up, once enough have been seen
    few = filled(values[:50], values[50:90])
    assert few.correlated is None
    assert few.redundancy == pytest.approx(first_redundancy(exact, 90), rel=1e-4)


def test_merging_keeps_the_first_competitions_of_a_shard_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRODUCTS", 0)
    count = CORRELATED + 1
    values = torch.randn(700, count) @ torch.randn(count, count)
    exact = values.double().numpy()
    both = filled(values[:100])
    both.merge(filled(values[100:250], values[250:258]))  # 258 in all: one pass
    assert both.correlated is None
    assert both.redundancy == pytest.approx(redundancy(exact[:258]), rel=1e-4)
    larger = filled(values[:100])
    larger.merge(filled(values[100:]))
    assert larger.correlated == 2 * count
    assert larger.redundancy == pytest.approx(redundancy(exact[100 : 100 + 2 * count]), rel=1e-4)
    larger.merge(filled(values[:90]))
    assert (larger.samples, larger.correlated) == (790, 2 * count)
    assert larger.redundancy == pytest.approx(redundancy(exact[100 : 100 + 2 * count]), rel=1e-4)
    empty = filled(values[:0])
    empty.merge(filled(values[:200]))
    empty.merge(filled(values[:0]))
    assert empty.redundancy == pytest.approx(redundancy(exact[:200]), rel=1e-4)


@pytest.mark.parametrize("count", [9, CORRELATED + 60])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_copies_are_found_whatever_is_added_to_all_scores(count: int, offset: float) -> None:
    values = torch.randn(500, 40) @ torch.randn(40, count)
    values[:, 7] = values[:, 2] + 3
    values[:, 5] = values[:, 2] - 1 + 0.02 * torch.randn(500)
    values[:, 8] = -values[:, 1]  # wholly correlated, and no copy
    values[:, 6] = 0.5 * values[:, 0]
    values += offset * torch.randn(500, 1)
    assert filled(*values.split(120)).pairs.result().copies == [[2, 5, 7]]
    assert filled(values[:20]).pairs.result().copies == []  # too few to tell
    assert filled(values[:, :1].expand(-1, count)).pairs.result().copies == []  # no two differ: that is a collapse


def test_what_is_held_is_not_what_is_squared() -> None:
    """The deviations of few competitions are kept as they are, while their squares are summed."""
    values = torch.randn(20, CORRELATED + 1)
    with torch.inference_mode():
        moments = filled(values[:10], values[10:])
    assert moments.redundancy == pytest.approx(redundancy(values.double().numpy()), rel=1e-4)


def test_copies_are_wholly_redundant_and_a_constant_is_not() -> None:
    x = torch.randn(1000, 1)
    assert filled(torch.cat([x, -2 * x + 1], 1)).redundancy == pytest.approx(1.0, rel=1e-5)
    assert filled(torch.cat([x, torch.ones_like(x)], 1)).redundancy == pytest.approx(0.0, abs=1e-9)


def test_any_axis_and_rows_that_are_not_finite() -> None:
    values = torch.randn(4, 3, 50)
    broken = values.clone()
    broken[2, 1, 7] = math.nan
    rows = values.movedim(1, -1).reshape(-1, 3)
    keep = broken.movedim(1, -1).reshape(-1, 3).isfinite().all(1)
    torch.testing.assert_close(filled(values, axis=1).variance, rows.double().var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        filled(broken, axis=1).variance, rows[keep].double().var(0, correction=0), rtol=1e-4, atol=0
    )


def test_nothing_to_say_about_one_sample() -> None:
    assert filled(torch.randn(1, 4)).variance is None
    assert filled(torch.randn(1, 4)).redundancy is None
