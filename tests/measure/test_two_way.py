"""Two-way responsibilities against an independent float64 computation, on both tails and in every layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emscan.measure.two_way import TwoWay, entropy, underflow
from emscan.report.document import Responsibility, Thresholds
from tests.measure.layouts import LAYOUTS, by_unit

T = Thresholds()
BIN = math.log(2) / 4096


def filled(*parts: Tensor, axis: int = 1, **more: object) -> TwoWay:
    found = TwoWay(tuple(range(parts[0].shape[axis])), T, **more)  # type: ignore[arg-type]
    for part in parts:
        found.update(part, (axis,))
    return found


def binary_entropy(u: np.ndarray) -> np.ndarray:
    """H by logaddexp in float64: no formula shared with the code under test."""
    a, b = -np.logaddexp(0, -u), -np.logaddexp(0, u)
    return -(np.exp(a) * a + np.exp(b) * b)


def check(found: Responsibility, u: Tensor) -> None:
    flat = u.double().flatten().numpy()
    r = np.exp(-np.logaddexp(0, -flat))
    h = binary_entropy(flat)
    larger = np.exp(-np.logaddexp(0, -np.abs(flat)))
    assert found.competitions == flat.size
    assert found.mean == pytest.approx(r.mean(), rel=1e-4)
    assert found.entropy.mean == pytest.approx(h.mean(), rel=1e-4)
    assert found.normalized_entropy == pytest.approx(h.mean() / math.log(2), rel=1e-4)
    assert found.entropy.min == pytest.approx(h.min(), rel=1e-4)
    assert found.entropy.max == pytest.approx(h.max(), rel=1e-4)
    for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        low, high = np.quantile(h, q, method="lower"), np.quantile(h, q, method="higher")
        assert low - BIN <= getattr(found.entropy, name) <= high + BIN
    assert found.max.mean == pytest.approx(larger.mean(), rel=1e-4)
    low, high = np.quantile(larger, 0.95, method="lower"), np.quantile(larger, 0.95, method="higher")
    assert found.max.p95 is not None
    assert low - 1 / 4096 <= found.max.p95 <= high + 1 / 4096
    share = (larger >= 0.99).mean()
    assert found.saturated == pytest.approx(share, abs=1e-12)
    assert found.hard_fraction == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("shift", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_equal_float64(scale: float, shift: float, dtype: torch.dtype) -> None:
    u = (torch.randn(301, 7) * scale + shift).to(dtype)
    check(filled(u).responsibility(), u)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    u, axis = LAYOUTS[layout]()
    u = (u * 3).to(dtype)
    found = filled(u, axis=axis)
    check(found.responsibility(), u)
    assert torch.equal(found.on, (by_unit(u, axis) > 0).sum(1))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-90, 90, width=32), min_size=1, max_size=50),
    st.integers(0, 49),
)
def test_any_values_batches_and_shards(values: list[float], cut: int) -> None:
    u = torch.tensor(values)[:, None]
    whole = filled(u).responsibility()
    check(whole, u)
    a, b = filled(u[:cut]), filled(u[cut:])
    a.merge(b)
    parts = filled(u[:cut], u[cut:])
    for other in (a.responsibility(), parts.responsibility()):
        assert other.entropy.mean == pytest.approx(whole.entropy.mean, rel=1e-5)
        assert other.mean == pytest.approx(whole.mean, rel=1e-5)
        assert (other.entropy.median, other.entropy.max) == (whole.entropy.median, whole.entropy.max)
        assert other.saturated == whole.saturated
    assert 0 <= whole.entropy.min <= whole.entropy.max <= math.log(2) + 1e-12


def test_more_values_than_one_piece() -> None:
    u = torch.randn(1 << 17, 5) * 2
    check(filled(u).responsibility(), u)


def test_frozen_units_stay_on_one_side() -> None:
    odds = math.log(99)
    u = torch.stack(
        [torch.full((9,), 6.0), torch.full((9,), -5.0), torch.linspace(-9, 9, 9), torch.linspace(odds - 0.1, 9, 9)], 1
    )
    both = torch.tensor([9.0, -9.0]).repeat(5)[:9, None]  # saturated on every value, but not on one side
    found = filled(*torch.cat([u, both], 1).split(2))
    assert found.frozen() == [0, 1]
    shard = filled(u[:4] * torch.tensor([1.0, 1, 0, 0]) + 8)
    shard.merge(filled(u[4:]))
    assert 1 not in shard.frozen()
    assert 0 in shard.frozen()


@pytest.mark.parametrize(("dtype", "edge"), [(torch.float32, 120.0), (torch.float16, 20.0)])
def test_dead_only_by_underflow_on_every_value(dtype: torch.dtype, edge: float) -> None:
    u = torch.stack([torch.full((12,), -edge), torch.full((12,), edge), torch.randn(12)], 1)
    u = torch.cat([u, torch.tensor([edge, -edge]).repeat(6)[:, None]], 1)
    found = filled(*u.split(4), derivative=underflow(torch.sigmoid, dtype))
    assert found.dead() == [0, 1, 3]
    u[11, 0] = 0.1
    assert filled(*u.split(4), derivative=underflow(torch.sigmoid, dtype)).dead() == [1, 3]


def test_odds_of_a_gate_are_the_callers() -> None:
    z = torch.randn(50, 3)
    found = TwoWay((0, 1, 2), T)
    found.update(z, (1,), lambda z: 2 * z)
    check(found.responsibility(), 2 * z)


def test_values_that_are_not_finite_are_told_and_left_out() -> None:
    u = torch.randn(40, 3)
    broken = u.clone()
    broken[3, 1] = math.nan
    found = filled(broken)
    assert found.nonfinite
    check(found.responsibility(), torch.cat([u.flatten()[:10], u.flatten()[11:]]))
    endless = filled(torch.tensor([[math.inf], [-math.inf]]))
    assert endless.nonfinite
    assert endless.responsibility().mean == pytest.approx(0.5)
    assert endless.responsibility().saturated == 1.0


def test_slices_of_one_layer_join_into_one_row() -> None:
    u = torch.randn(30, 8)
    first, second = TwoWay((4, 5, 6, 7), T), TwoWay((0, 1, 2, 3), T)
    first.update(u[:, :4], (1,))
    second.update(u[:, 4:], (1,))
    joined = TwoWay.joined([first, second], T)
    check(joined.responsibility(), u)
    assert joined.rows == (4, 5, 6, 7, 0, 1, 2, 3)
    assert torch.equal(joined.on, (u > 0).sum(0))


def test_entropy_of_one_value() -> None:
    assert entropy(0.0) == pytest.approx(math.log(2))
    assert entropy(-800.0) == 0.0
    for u in (-30.0, -0.1, 3.0, 700.0):
        assert entropy(u) == pytest.approx(float(binary_entropy(np.float64(u))), rel=1e-9)


def test_nothing_seen() -> None:
    assert TwoWay((0,), T).responsibility() == Responsibility(0)
    assert TwoWay((0,), T).frozen() == []


@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("shift", [-8.0, 0.0, 8.0])
def test_values_counted_in_bins(scale: float, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the first million, sums come from bins of u: as exact as the values are many."""
    monkeypatch.setattr("emscan.measure.two_way._EXACT", 1000)
    torch.manual_seed(0)
    u = torch.randn(40_000, 7) * scale + shift
    check(filled(*u.split(2000)).responsibility(), u)
    half, other = filled(*u[:9000].split(2000)), filled(*u[9000:].split(1500))
    half.merge(other)
    check(half.responsibility(), u)


def test_bins_and_values_beyond_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emscan.measure.two_way._EXACT", 0)
    torch.manual_seed(0)
    u = torch.randn(3, 5000, 4) * 3
    u[1] *= 30  # a piece that leaves the bins
    found = filled(*u)
    check(found.responsibility(), u)
    assert not found.nonfinite
    u[2, 7, 1] = math.nan
    bad = filled(*u)
    assert bad.nonfinite
    assert bad.responsibility().competitions == u.numel() - 1


def test_a_threshold_of_its_own_for_hardness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emscan.measure.two_way._EXACT", 0)
    torch.manual_seed(0)
    u = torch.randn(20_000, 3) * 3
    found = TwoWay((0, 1, 2), Thresholds(saturated=0.95, hard=0.9))
    found.update(u, (1,))
    larger = torch.sigmoid(u.double().abs())
    spread = found.responsibility()
    assert spread.hard_fraction == pytest.approx(float((larger >= 0.9).double().mean()), abs=1e-9)
    assert spread.saturated == pytest.approx(float((larger >= 0.95).double().mean()), abs=1e-9)
