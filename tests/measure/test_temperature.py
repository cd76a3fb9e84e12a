"""Entropies with all energies halved and doubled, against float64; limits, masks, samples, shards, two-way rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import emscan
from emscan.measure import alternatives as alternatives_module
from emscan.measure import temperature as module
from emscan.measure.alternatives import Alternatives
from emscan.measure.two_way import TwoWay
from emscan.report.document import Thresholds

T = Thresholds()


def normalized(scores: Tensor, scale: float) -> float:
    """Mean of H / ln(alternatives seen) of softmax(scale * scores), float64; -inf is masked."""
    s = scores.double() * scale
    log_r = s.log_softmax(-1)
    h = -(log_r.exp() * log_r.clamp(min=-1e300)).sum(-1)
    seen = scores.isfinite().sum(-1)
    real = seen >= 2
    return float((h[real] / seen[real].double().log()).mean())


def seen_scores(scores: Tensor, **how: object) -> Alternatives:
    stats = Alternatives(scores.shape[-1], True, T)
    for part in scores.split(int(how.pop("size", len(scores)))):  # type: ignore[call-overload]
        stats.update_scores(part, **how)  # type: ignore[arg-type]
    return stats


@pytest.mark.parametrize("sharp", [0.01, 1.0, 6.0, 30.0])
@pytest.mark.parametrize("count", [2, 10, 300])
@pytest.mark.parametrize("exact", [True, False])
def test_half_and_double_equal_float64(monkeypatch: pytest.MonkeyPatch, sharp: float, count: int, exact: bool) -> None:
    if not exact:
        monkeypatch.setattr(alternatives_module, "_EXACT", 0)
    scores = torch.randn(400, count) * sharp
    found = seen_scores(scores, size=130).responsibility()
    assert found.temperature is not None
    assert found.temperature.sampled is None
    assert found.temperature.half == pytest.approx(normalized(scores, 0.5), rel=1e-4, abs=1e-9)
    assert found.temperature.double == pytest.approx(normalized(scores, 2.0), rel=1e-4, abs=1e-7)
    assert found.temperature.double <= found.normalized_entropy <= found.temperature.half
    stats = Alternatives(count, True, T)
    stats.update(scores.double().softmax(-1))
    from_shares = stats.responsibility().temperature
    assert from_shares.half == pytest.approx(normalized(scores, 0.5), rel=1e-4, abs=1e-9)
    assert from_shares.double == pytest.approx(normalized(scores, 2.0), rel=1e-4, abs=1e-9)


def test_limits_of_high_and_of_zero_temperature() -> None:
    flat = seen_scores(torch.zeros(50, 7)).responsibility().temperature
    assert (flat.half, flat.double) == (pytest.approx(1), pytest.approx(1))
    hard = seen_scores(torch.eye(7) * 1000, masks=False).responsibility().temperature
    assert (hard.half, hard.double) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    tie = torch.full((5, 6), -400.0)
    tie[:, :2] = 0  # two of six stay equal at any temperature
    between = seen_scores(tie).responsibility()
    assert between.temperature.half == between.temperature.double == pytest.approx(math.log(2) / math.log(6))


def test_masked_alternatives_take_no_part() -> None:
    scores = torch.randn(60, 8)
    scores[::3, 5:] = -math.inf
    scores[7, 1:] = -math.inf  # a single one in sight
    scores[9] = -math.inf
    found = seen_scores(scores).responsibility().temperature
    kept = scores[[i for i in range(60) if i != 9]]
    assert found.half == pytest.approx(normalized(kept, 0.5), rel=1e-6)
    assert found.double == pytest.approx(normalized(kept, 2.0), rel=1e-6)


def test_long_probes_are_judged_by_their_first_competitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", 1200)
    monkeypatch.setattr(module, "_LEAST", 10)
    scores = torch.randn(1000, 12) * 2
    for size in (1000, 64, 7):
        found = seen_scores(scores, size=size).responsibility()
        assert found.temperature.sampled == 100
        assert found.temperature.half == pytest.approx(normalized(scores[:100], 0.5), rel=1e-6)
        assert found.temperature.double == pytest.approx(normalized(scores[:100], 2.0), rel=1e-6)
        assert found.normalized_entropy == pytest.approx(normalized(scores, 1.0), rel=1e-6)
    first, second = seen_scores(scores[:30]), seen_scores(scores[30:])
    first.merge(second)  # both do not fit: the shard that saw more
    assert first.responsibility().temperature.half == pytest.approx(normalized(scores[30:130], 0.5), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 40), st.floats(0.01, 30.0), st.integers(0, 10_000))
def test_shards_and_batches_equal_one_pass(k: int, n: int, cut: int, sharp: float, seed: int) -> None:
    scores = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * sharp
    whole, parts, shard = seen_scores(scores), seen_scores(scores, size=3), seen_scores(scores[:cut])
    shard.merge(seen_scores(scores[cut:]))
    expected = whole.responsibility()
    assert 0 <= expected.temperature.double <= expected.normalized_entropy + 1e-12
    assert expected.normalized_entropy <= expected.temperature.half + 1e-12 <= 1 + 1e-9
    assert expected.temperature.half == pytest.approx(normalized(scores, 0.5), rel=1e-6, abs=1e-9)
    for other in (parts.responsibility(), shard.responsibility()):
        assert other.temperature.half == pytest.approx(expected.temperature.half, rel=1e-9, abs=1e-12)
        assert other.temperature.double == pytest.approx(expected.temperature.double, rel=1e-9, abs=1e-12)


def binary(u: np.ndarray) -> float:
    q = np.exp(-np.abs(u)) / (1 + np.exp(-np.abs(u)))
    return float((np.abs(u) * q - np.log1p(-q)).mean() / math.log(2))


@pytest.mark.parametrize("sharp", [0.001, 0.3, 2.0, 12.0, 60.0, 5000.0])
def test_two_way_units_from_their_histogram(sharp: float) -> None:
    u = torch.randn(3000, 6) * sharp
    whole = TwoWay(tuple(range(6)), T)
    for part in u.split(900):
        whole.update(part, (1,))
    found = whole.responsibility().temperature
    assert found.half == pytest.approx(binary(u.double().numpy() * 0.5), rel=1e-3)
    assert found.double == pytest.approx(binary(u.double().numpy() * 2), rel=1e-3)
    first, second = TwoWay(tuple(range(6)), T), TwoWay(tuple(range(6)), T)
    first.update(u[:1000], (1,))
    second.update(u[1000:], (1,))
    first.merge(second)
    joined = TwoWay.joined([first], T).responsibility().temperature
    assert joined.half == pytest.approx(found.half, rel=1e-9)
    assert joined.double == pytest.approx(found.double, rel=1e-9)


def test_all_values_far_out_have_no_floor() -> None:
    part = TwoWay((0,), T)
    part.update(torch.full((10, 1), 40.0), (1,))
    found = part.responsibility().temperature
    assert found.half == pytest.approx(binary(np.array([20.0])), rel=1e-6)
    assert found.double == pytest.approx(0, abs=1e-12)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.centres, self.out = nn.Linear(5, 3), nn.Parameter(torch.randn(6, 3)), nn.Linear(6, 2)

    def forward(self, x):
        k = (1 + torch.cdist(self.enc(x), self.centres) ** 2).reciprocal()
        return self.out(k / k.sum(-1, keepdim=True))


def test_kernels_have_their_logarithm_for_energy() -> None:
    model, x = Student(), torch.randn(200, 5) * 3
    row = next(layer for layer in emscan.audit(model, x).layers if layer.mechanism == "kernel")
    with torch.no_grad():
        scores = -torch.log1p(torch.cdist(model.enc(x).double(), model.centres.double()) ** 2)
    assert row.responsibility.temperature.half == pytest.approx(normalized(scores, 0.5), rel=1e-4)
    assert row.responsibility.temperature.double == pytest.approx(normalized(scores, 2.0), rel=1e-4)
    assert row.components.variance == pytest.approx(scores.var(0, correction=0).tolist(), rel=1e-4)


def test_hard_rows_have_no_temperature() -> None:
    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.dec = nn.Linear(5, 20), nn.Linear(20, 5)

        def forward(self, x):
            values, indices = self.enc(x).topk(3, -1)
            return self.dec(torch.zeros(len(x), 20).scatter(-1, indices, values))

    row = next(layer for layer in emscan.audit(Latents(), torch.randn(40, 5)).layers if layer.mechanism == "truncation")
    assert row.responsibility.temperature is None
