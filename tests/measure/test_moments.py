"""Variance and redundancy of components against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_many_components_have_variances_but_no_correlations() -> None:
    values = torch.randn(500, CORRELATED + 1)
    moments = filled(*values.split(100))
    shard = filled(values[:50])
    shard.merge(filled(values[50:]))
    for found in (moments, shard):
        assert found.redundancy is None
        torch.testing.assert_close(found.variance, values.double().var(0, correction=0), rtol=1e-4, atol=0)


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
