"""Alternatives against scipy-free float64 recomputation: loads, entropies, information, who is dead and who starves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emscan.measure import alternatives as module
from emscan.measure.alternatives import Alternatives, visible_alternatives
from emscan.report.document import Thresholds

T = Thresholds()


def posterior(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def h_of(r: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(r > 0, r * np.log(r), 0).sum(-1)


def check(stats: Alternatives, r: np.ndarray) -> None:
    """``r``: (competitions, K), float64, all alternatives visible."""
    n, k = r.shape
    h, best, load = h_of(r), r.max(-1), r.mean(0)
    found = stats.responsibility()
    assert found.competitions == n
    assert found.entropy.mean == pytest.approx(h.mean(), rel=1e-4, abs=1e-9)
    assert found.entropy.min == pytest.approx(h.min(), rel=1e-4, abs=1e-6)
    assert found.entropy.max == pytest.approx(h.max(), rel=1e-4, abs=1e-6)
    assert found.normalized_entropy == pytest.approx(h.mean() / math.log(k), rel=1e-4, abs=1e-9)
    for name, q in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        exact = np.quantile(h, q, method="lower")
        assert getattr(found.entropy, name) == pytest.approx(exact, abs=math.log(k) / 4096 + 1e-6)
    assert found.max.mean == pytest.approx(best.mean(), rel=1e-4)
    assert found.max.p95 == pytest.approx(np.quantile(best, 0.95, method="lower"), abs=1 / 4096 + 1e-6)
    assert found.hard_fraction == pytest.approx((best >= 0.99).mean(), abs=1e-12)
    if stats.persistent:
        assert stats.load is not None
        np.testing.assert_allclose(stats.load.numpy(), load, rtol=1e-4, atol=1e-12)
        assert float(stats.load.sum()) == pytest.approx(1, abs=1e-6)
        assert found.effective_components == pytest.approx(math.exp(h_of(load)), rel=1e-4)
        assert found.information == pytest.approx(h_of(load) - h.mean(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("shape", [(200, 10, -1), (50, 300, -1), (10, 4, 1), (1000, 2, -1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sharp", [0.01, 1.0, 8.0])
def test_scores_and_responsibilities_equal_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, sharp: float
) -> None:
    n, k, axis = shape
    scores = (torch.randn(n, k, 3, 5) if axis == 1 else torch.randn(n, k)).mul(sharp).to(dtype)
    r = posterior(scores.double().movedim(axis, -1).reshape(-1, k).numpy())
    stats = Alternatives(k, True, T)
    stats.update_scores(scores, axis)
    check(stats, r)
    stats = Alternatives(k, True, T)
    stats.update(torch.softmax(scores.double(), axis), axis)
    check(stats, r)


def test_float32_takes_over_on_long_probes_and_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXACT", 1000)
    scores = torch.randn(5000, 12) * 2
    r = posterior(scores.double().numpy())
    for persistent in (True, False):
        stats = Alternatives(12, persistent, T)
        stats.update_scores(scores)
        check(stats, r)
        stats = Alternatives(12, persistent, T)
        for part in torch.softmax(scores, -1).split(300):
            stats.update(part)
        check(stats, r)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 9), st.integers(1, 30), st.integers(0, 30), st.floats(0.0, 30.0), st.integers(0, 10_000))
def test_invariants_hold_for_any_scores_batches_and_shards(k: int, n: int, cut: int, sharp: float, seed: int) -> None:
    scores = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * sharp
    whole, a, b, parts = (Alternatives(k, True, T) for _ in range(4))
    whole.update_scores(scores)
    a.update_scores(scores[:cut])
    b.update_scores(scores[cut:])
    a.merge(b)
    for part in scores[torch.randperm(n, generator=torch.Generator().manual_seed(seed))].split(7):
        parts.update_scores(part)
    found = whole.responsibility()
    assert found.information is not None
    assert found.effective_components is not None
    assert 0 <= found.information <= math.log(k) + 1e-9
    assert 0 <= found.entropy.min <= found.entropy.p05 <= found.entropy.median <= found.entropy.p95  # type: ignore[operator]
    assert found.entropy.max <= math.log(k) + 1e-9  # type: ignore[operator]
    assert 1 - 1e-9 <= found.effective_components <= k + 1e-9
    for other in (a, parts):
        assert torch.equal(other.entropy.counts, whole.entropy.counts)
        torch.testing.assert_close(other.load, whole.load)
        assert other.information() == pytest.approx(whole.information(), rel=1e-6, abs=1e-9)
        assert (other.competitions, other.hard) == (whole.competitions, whole.hard)


def test_a_uniform_collapse_has_perfect_load_and_no_information() -> None:
    stats = Alternatives(16, True, T)
    stats.update_scores(torch.randn(100, 1).expand(100, 16))
    found = stats.responsibility()
    assert found.effective_components == pytest.approx(16)
    assert found.information == pytest.approx(0, abs=1e-12)
    certain = Alternatives(16, True, T)
    certain.update_scores(torch.eye(16) * 200)
    assert certain.responsibility().information == pytest.approx(math.log(16))


def test_masked_alternatives_do_not_count() -> None:
    scores = torch.randn(4, 6)
    masked = scores.clone()
    masked[0, 3:] = -math.inf
    masked[1, 1:] = torch.finfo(torch.float32).min  # a single key in sight
    masked[2, :] = -math.inf  # none
    stats = Alternatives(6, False, T)
    stats.update_scores(masked)
    rows = [posterior(scores[0, :3].double().numpy()), posterior(scores[3].double().numpy())]
    h = [float(h_of(r)) for r in rows]
    found = stats.responsibility()
    assert found.competitions == 3
    assert found.entropy.mean == pytest.approx(sum(h) / 2, rel=1e-6)
    assert found.normalized_entropy == pytest.approx((h[0] / math.log(3) + h[1] / math.log(6)) / 2, rel=1e-6)
    assert not stats.nonfinite
    by_hand = Alternatives(6, False, T)
    shown = visible_alternatives(masked, -1)
    assert shown is not None
    by_hand.update(torch.softmax(masked, -1)[[0, 1, 3]], -1, shown[[0, 1, 3]])
    assert by_hand.responsibility().normalized_entropy == pytest.approx(found.normalized_entropy, rel=1e-6)
    assert visible_alternatives(scores, -1) is None


def test_axes_that_vary_in_length() -> None:
    stats = Alternatives(8, False, T)
    h = []
    for width in (8, 3, 1):
        scores = torch.randn(5, width)
        stats.update_scores(scores)
        if width > 1:
            h.extend(h_of(posterior(scores.double().numpy())) / math.log(width))
    found = stats.responsibility()
    assert (found.competitions, stats.measured) == (15, 10)
    assert found.normalized_entropy == pytest.approx(np.mean(h), rel=1e-6)


def test_starved_and_dead() -> None:
    scores = torch.zeros(50, 4)
    scores[:, 3] = -20.0
    soft = Alternatives(4, True, T)
    soft.update_scores(scores)
    found = soft.components("classes", hard=False)
    assert found is not None
    assert (found.dead, found.starved) == ([], [3])
    r = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).repeat(300, 1)
    r[7] = torch.tensor([0.0, 0.0, 1e-3, 1 - 1e-3])[[0, 1, 2, 3]]
    hard = Alternatives(4, True, T)
    hard.update(torch.cat([r, torch.zeros(3, 4)]))  # three rows in which nothing competes
    found = hard.components("latents", hard=True)
    assert found is not None
    assert (found.dead, found.starved) == ([], [2, 3])
    np.testing.assert_allclose(found.load, r.double().mean(0).numpy(), rtol=1e-6)
    hard = Alternatives(4, True, T)
    hard.update(r[:2])
    assert hard.components("latents", hard=True).dead == [2, 3]  # type: ignore[union-attr]


def test_starved_is_measured_against_the_uniform_share() -> None:
    stats = Alternatives(100, True, T)
    r = torch.full((1, 100), 1.0)
    r[0, 3], r[0, 5], r[0, 9] = 0.009, 0.011, 0.0
    stats.update(r / r.sum())
    assert stats.components("experts", hard=True).starved == [3]  # type: ignore[union-attr]
    assert stats.components("classes", hard=False).starved == [3, 9]  # type: ignore[union-attr]


def test_routers_load_by_assignments_and_by_posterior() -> None:
    scores = torch.randn(500, 8) + torch.linspace(2, -2, 8)
    scores[:, 7] = -9.0
    r = torch.softmax(scores, -1)
    chosen = r.topk(2, -1).indices
    stats = Alternatives(8, True, T)
    for part in (slice(0, 200), slice(200, 500)):
        stats.update(r[part])
        stats.update_assignments(chosen[part])
    counts = np.bincount(chosen.flatten().numpy(), minlength=8)
    found = stats.components("experts", hard=True)
    assert found is not None
    np.testing.assert_allclose(found.load, counts / 1000)
    np.testing.assert_allclose(found.soft_load, r.double().mean(0).numpy(), rtol=1e-5)
    assert found.dead == np.flatnonzero(counts == 0).tolist() == [7]
    assert set(found.starved).isdisjoint(found.dead)
    answer = stats.responsibility(router=True)
    assert answer.max_violation == pytest.approx(counts.max() / 1000 * 8 - 1)
    assert answer.effective_components == pytest.approx(math.exp(h_of(counts / 1000)), rel=1e-9)
    assert answer.information == pytest.approx(
        h_of(r.double().mean(0).numpy()) - h_of(r.double().numpy()).mean(), rel=1e-4
    )


def test_assignments_alone_and_samples_that_nothing_took() -> None:
    stats = Alternatives(5, True, T)
    stats.update_assignments(torch.tensor([[0, 1], [0, -1]]))
    other = Alternatives(5, True, T)
    other.update_assignments(torch.tensor([2], dtype=torch.int32))
    stats.merge(other)
    assert stats.load is not None
    assert stats.load.tolist() == [0.5, 0.25, 0.25, 0.0, 0.0]
    assert stats.components("codes", hard=True).dead == [3, 4]  # type: ignore[union-attr]
    assert stats.responsibility().competitions == 4


def test_amounts_that_do_not_sum_to_one_load_by_use() -> None:
    latents = torch.zeros(100, 6)
    latents.scatter_(1, torch.randint(0, 5, (100, 2)), 7.0)
    stats, shard = Alternatives(6, True, T), Alternatives(6, True, T)
    stats.update(latents[:1] / latents[:1].sum())  # one shard happens to see shares alone
    for part in latents[1:].split(30):
        shard.update(part)
    stats.merge(shard)
    used = (latents != 0).sum(0).double()
    assert stats.load is not None
    torch.testing.assert_close(stats.load, used / used.sum())
    assert stats.components("latents", hard=True).dead == [5]  # type: ignore[union-attr]
    assert stats.responsibility().entropy.max == pytest.approx(math.log(2), rel=1e-6)


def test_rows_that_are_not_finite_are_told_and_left_out() -> None:
    scores = torch.randn(20, 4)
    for way in ("scores", "responsibilities"):
        broken = scores.clone()
        broken[5, 2] = math.nan
        stats = Alternatives(4, True, T)
        if way == "scores":
            stats.update_scores(broken)
        else:
            stats.update(torch.softmax(broken, -1))
        assert stats.nonfinite
        check(stats, posterior(scores[[i for i in range(20) if i != 5]].double().numpy()))


def test_scale_reads_energies_as_scores_without_touching_them() -> None:
    energies = torch.randn(30, 5).bfloat16()
    before = energies.clone()
    stats = Alternatives(5, True, T)
    stats.update_scores(energies, scale=-math.log(2))
    check(stats, posterior(-math.log(2) * energies.double().numpy()))
    assert torch.equal(energies, before)


def test_variance_and_redundancy_come_with_the_components() -> None:
    scores = torch.randn(400, 3)
    stats = Alternatives(3, True, T)
    stats.update_scores(scores)
    stats.update_energies(scores)
    found = stats.components("prototypes", hard=False)
    assert found is not None
    np.testing.assert_allclose(found.variance, scores.double().var(0, correction=0).numpy(), rtol=1e-4)
    assert found.redundancy is not None
    assert 0 <= found.redundancy < 0.05


def test_alternatives_without_identity_have_no_components() -> None:
    stats = Alternatives(5, False, T)
    stats.update_scores(torch.randn(3, 5))
    assert stats.components("keys", hard=False) is None
    assert stats.responsibility().information is None


def test_a_single_alternative_is_no_competition() -> None:
    stats = Alternatives(1, True, T)
    stats.update_scores(torch.randn(4, 1))
    found = stats.responsibility()
    assert found.normalized_entropy is None
    assert found.entropy.mean is None


def test_inputs_of_any_memory_order_are_left_alone() -> None:
    scores = torch.randn(3, 7, 4, 5).to(memory_format=torch.channels_last)
    before: Tensor = scores.clone()
    stats = Alternatives(7, True, T)
    stats.update_scores(scores, 1)
    stats.update_energies(scores, 1)
    stats.update(torch.softmax(scores, 1), 1)
    assert torch.equal(scores, before)
    assert stats.competitions == 2 * 60


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 40), st.floats(0.0, 20.0), st.integers(0, 10_000))
def test_books_and_shards_equal_one_pass(k: int, books: int, cut: int, sharp: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, books, k, generator=draw) * sharp
    chosen = scores.argmax(-1)

    def over(*parts: slice) -> Alternatives:
        stats = Alternatives(k, True, T, books)
        for part in parts:
            for book in range(books):
                stats.update_scores(scores[part, book], book=book)
                stats.update_energies(scores[part, book], book=book)
                stats.update_assignments(chosen[part, book], book=book)
        return stats

    whole, shard, batches = over(slice(0, 40)), over(slice(0, cut)), over(slice(0, 11), slice(11, 40))
    shard.merge(over(slice(cut, 40)))
    r = posterior(scores.double().numpy())
    soft = r.mean(0).ravel() / books
    for stats in (whole, shard, batches):
        found, spread = stats.components("codes", hard=True, samples=40), stats.responsibility()
        assert found is not None
        assert found.count == k * books
        np.testing.assert_allclose(found.mass, r.sum(0).ravel(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.soft_load, soft, rtol=1e-6, atol=1e-12)
        assert sum(found.load) == pytest.approx(1)  # type: ignore[arg-type]
        counts = np.stack([np.bincount(chosen[:, b].numpy(), minlength=k) for b in range(books)])
        assert found.dead == np.flatnonzero(counts.ravel() == 0).tolist()
        information = (h_of(r.mean(0)) - h_of(r).mean(0)).mean()
        assert spread.information == pytest.approx(information, rel=1e-6, abs=1e-9)
        np.testing.assert_allclose(
            found.variance, scores.double().numpy().var(0).ravel(), rtol=1e-4, atol=1e-9 * (1 + sharp**2)
        )
        assert found.redundancy == pytest.approx(whole.components("codes", hard=True).redundancy, rel=1e-3, abs=1e-6)


def test_scores_of_minus_infinity_count_where_classes_are_never_masked() -> None:
    scores = torch.randn(30, 5)
    scores[:, 2] = -math.inf
    stats = Alternatives(5, True, T)
    stats.update_scores(scores, masks=False)
    check(stats, posterior(scores.double().numpy()))
    assert stats.components("classes", hard=False).starved == [2]  # type: ignore[union-attr]


def test_pieces_with_and_without_a_mask_are_counted_together() -> None:
    """Entropies of several pieces are counted at once."""
    scores = torch.randn(90_000, 6)
    scores[80_000:, 4:] = -math.inf
    stats = Alternatives(6, True, T)
    stats.update_scores(scores)
    first, second = scores[:80_000], scores[80_000:, :4]
    h = [h_of(posterior(part.double().numpy())) for part in (first, second)]
    found = stats.responsibility()
    assert found.competitions == 90_000
    assert found.entropy.mean == pytest.approx(np.concatenate(h).mean(), rel=1e-4)
    exact = (h[0].sum() / math.log(6) + h[1].sum() / math.log(4)) / 90_000
    assert found.normalized_entropy == pytest.approx(exact, rel=1e-4)
