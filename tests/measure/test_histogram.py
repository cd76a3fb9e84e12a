"""Histograms: every count, mean and extreme is exact, every quantile right to one bin, however the values arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emscan.measure.histogram import Histogram

LN_K = math.log(50)
floats = st.lists(st.floats(0, 3.875, width=32), min_size=1, max_size=60)


def filled(values: torch.Tensor, high: float = LN_K) -> Histogram:
    histogram = Histogram(0.0, high)
    histogram.update(values)
    return histogram


@settings(deadline=None)
@given(floats, st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
def test_quantiles_are_right_to_one_bin_and_extremes_exact(values: list[float], q: float) -> None:
    histogram = filled(torch.tensor(values))
    exact = float(np.quantile(np.float32(values), q, method="lower"))
    assert histogram.quantile(q) == pytest.approx(exact, abs=LN_K / 4096 * 1.01)
    assert histogram.minimum == min(np.float32(values))
    assert histogram.maximum == max(np.float32(values))
    assert histogram.mean == pytest.approx(float(np.mean(np.float64(np.float32(values)))), rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(floats, floats)
def test_merging_equals_one_pass(a: list[float], b: list[float]) -> None:
    merged = filled(torch.tensor(a))
    merged.merge(filled(torch.tensor(b)))
    whole = filled(torch.tensor(a + b))
    assert torch.equal(merged.counts, whole.counts)
    assert (merged.count, merged.minimum, merged.maximum) == (whole.count, whole.minimum, whole.maximum)
    assert merged.total == pytest.approx(whole.total, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_shape_and_memory_order(dtype: torch.dtype) -> None:
    values = torch.rand(5, 6, 7, 8).to(dtype)
    plain = filled(values.flatten(), 1.0)
    for other in (values, values.to(memory_format=torch.channels_last), values.permute(3, 1, 0, 2), values[:, :, ::2]):
        found = filled(other, 1.0)
        assert int(found.counts.sum()) == other.numel()
        assert found.mean == pytest.approx(float(other.double().mean()), rel=1e-5)
        if other.numel() == values.numel():
            assert torch.equal(found.counts, plain.counts)


def test_values_just_outside_fall_into_the_outermost_bins() -> None:
    histogram = filled(torch.tensor([-1e-7, LN_K + 1e-5]))
    assert histogram.counts[0] == 1
    assert histogram.counts[-1] == 1


def test_nan_and_infinities_are_counted_apart() -> None:
    histogram = filled(torch.tensor([0.5, math.nan, math.inf, -math.inf, 1.5]))
    assert (histogram.nonfinite, histogram.count) == (3, 2)
    assert histogram.mean == 1.0
    assert filled(torch.tensor([math.nan])).quantile(0.5) is None


def test_more_values_than_one_piece_and_none_at_all() -> None:
    values = torch.rand((1 << 18) * 2 + 17)
    histogram = filled(values, 1.0)
    assert int(histogram.counts.sum()) == histogram.count == len(values)
    assert histogram.mean == pytest.approx(float(values.double().mean()), rel=1e-6)
    assert filled(torch.empty(0)).quantile(0.5) is None
    assert filled(torch.empty(0)).mean is None


def test_degenerate_range_of_a_single_alternative() -> None:
    histogram = Histogram(0.0, 0.0)
    histogram.update(torch.zeros(4))
    assert histogram.quantile(0.5) == 0.0
