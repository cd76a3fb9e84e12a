"""Attention per head against softmax written out in float64, for every kind of mask and piece."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emscan.measure import queries as module
from emscan.measure.attention import AttentionHeads
from emscan.report.document import Thresholds

T = Thresholds()
B, H, L, S, E = 3, 4, 9, 9, 5


def reference(scores: Tensor, shown: Tensor, *, own: bool = True) -> dict[str, Any]:
    """``scores``, ``shown``: (B, H, L, S); means over the queries that see a key (entropies: two)."""
    shown = shown.expand(scores.shape)
    s = torch.where(shown, scores.double(), -math.inf)
    r = torch.softmax(s, -1).nan_to_num()
    h = torch.special.entr(r).sum(-1)
    seen = shown.sum(-1)
    if own and shown.shape[-1] == scores.shape[-2]:
        seen = seen * shown.any(-2)  # what no query may look at is padding
    any_, real = seen >= 1, seen >= 2
    r = r * any_[..., None]
    norm = torch.where(real, h / seen.clamp(min=2).double().log(), 0)
    hard = ((r.amax(-1) >= 0.99) & real).double()
    over = (0, 2)
    found = {
        "competitions": int(any_.sum()),
        "h": h[real],
        "max": r.amax(-1)[real],
        "normalized": norm.sum() / real.sum(),
        "hard": hard.sum() / real.sum(),
        "heads_normalized": norm.sum(over) / real.sum(over),
        "heads_first": r[..., 0].sum(over) / any_.sum(over),
        "heads_hard": hard.sum(over) / real.sum(over),
    }
    if scores.shape[-1] == scores.shape[-2]:
        found["heads_diagonal"] = r.diagonal(0, -2, -1).sum(over) / any_.sum(over)
    return found


def check(heads: AttentionHeads, expected: dict[str, Any]) -> None:
    found = heads.responsibility()
    h = expected["h"].numpy()
    assert found.competitions == expected["competitions"]
    assert found.entropy.mean == pytest.approx(h.mean(), rel=1e-4)
    assert found.entropy.min == pytest.approx(h.min(), rel=1e-4, abs=1e-5)
    assert found.entropy.max == pytest.approx(h.max(), rel=1e-4)
    assert found.entropy.median == pytest.approx(np.quantile(h, 0.5, method="lower"), abs=math.log(64) / 4096)
    assert found.normalized_entropy == pytest.approx(float(expected["normalized"]), rel=1e-4)
    assert found.max.mean == pytest.approx(float(expected["max"].mean()), rel=1e-4)
    assert found.hard_fraction == pytest.approx(float(expected["hard"]), abs=1e-9)
    assert found.heads is not None
    assert len(found.heads) == heads.heads
    for i, head in enumerate(found.heads):
        assert head.normalized_entropy == pytest.approx(float(expected["heads_normalized"][i]), rel=1e-4)
        assert head.first_key == pytest.approx(float(expected["heads_first"][i]), rel=1e-4)
        assert head.hard_fraction == pytest.approx(float(expected["heads_hard"][i]), abs=1e-9)
        if "heads_diagonal" in expected:
            assert head.diagonal == pytest.approx(float(expected["heads_diagonal"][i]), rel=1e-4)
        else:
            assert head.diagonal is None


def inputs(length: int = L, size: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, H, length, E), torch.randn(B, H, size, E), torch.randn(B, H, size, E)
    return (q * 2).to(dtype), k.to(dtype), v.to(dtype)


def scores_of(q: Tensor, k: Tensor, scale: float = E**-0.5) -> Tensor:
    return q.double() @ k.double().transpose(-2, -1) * scale


MASKS = {
    "none": lambda: None,
    "padding": lambda: torch.rand(B, 1, 1, S) > 0.4,
    "per query": lambda: torch.rand(L, S) > 0.5,
    "per head": lambda: torch.rand(B, H, L, S) > 0.7,
    "one query sees one key": lambda: torch.eye(L, S).bool() | (torch.arange(L) > 2)[:, None],
    "one query sees nothing": lambda: (torch.arange(L) != 4)[:, None].expand(L, S),
    "queries alone": lambda: (torch.arange(L) != 4)[:, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at_a_time", [1 << 19, 400, 20])
def test_masks_in_every_form_and_piece(
    mask: str, additive: bool, causal: bool, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCORES", at_a_time)
    q, k, _ = inputs()
    shown = MASKS[mask]()
    given: Tensor | None = shown
    scores = scores_of(q, k)
    if additive and shown is not None:
        bias = torch.randn(shown.shape)
        given = torch.where(shown, bias, -math.inf)
        scores = scores + bias.double()
    visible = torch.ones(L, S, dtype=torch.bool) if shown is None else shown
    visible = visible & torch.ones(L, S).tril().bool() if causal else visible
    before = [t.clone() for t in (q, k)]
    heads = AttentionHeads(H, 64, T)
    heads.update(q, k, mask=given, causal=causal)
    check(heads, reference(scores, visible))
    assert not heads.nonfinite
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_measured_in_float32(dtype: torch.dtype) -> None:
    q, k, _ = inputs(dtype=dtype)
    heads = AttentionHeads(H, 64, T)
    heads.update(q, k)
    check(heads, reference(scores_of(q, k), torch.ones(L, S, dtype=torch.bool)))


def test_scale_other_lengths_and_strided_heads() -> None:
    q, k, _ = inputs(7, 12)
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    heads = AttentionHeads(H, 64, T)
    heads.update(q, k, scale=1.7)
    check(heads, reference(scores_of(q, k, 1.7), torch.ones(7, 12, dtype=torch.bool)))


def test_grouped_queries_share_their_keys() -> None:
    q, k, _ = inputs()
    heads = AttentionHeads(H, 64, T)
    heads.update(q, k[:, :2])
    repeated = k[:, :2].repeat_interleave(2, 1)
    check(heads, reference(scores_of(q, repeated), torch.ones(L, S, dtype=torch.bool)))


@pytest.mark.parametrize("at_a_time", [1 << 19, 400, 20])
def test_explicit_scores_and_probabilities_say_the_same(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", at_a_time)
    q, k, _ = inputs()
    shown = torch.rand(B, 1, L, S) > 0.3
    scores = scores_of(q, k).float()
    expected = reference(scores, shown)
    by_scores, by_energies, by_share = (AttentionHeads(H, 64, T) for _ in range(3))
    masked = scores.masked_fill(~shown, -1e9)
    by_scores.update_scores(masked)
    by_energies.update_scores(-masked, -1.0)
    by_share.update_weights(torch.softmax(masked, -1) * 3)
    for heads in (by_scores, by_energies, by_share):
        check(heads, expected)
    assert masked.min() == -1e9


def test_merging_and_batches_equal_one_pass() -> None:
    q, k, v = inputs()
    out = F.scaled_dot_product_attention(q, k, v)
    whole, merged, parts = (AttentionHeads(H, 64, T) for _ in range(3))
    whole.update(q, k, output=out)
    merged.update(q[:1], k[:1], output=out[:1])
    other = AttentionHeads(H, 64, T)
    other.update(q[1:], k[1:], output=out[1:])
    merged.merge(other)
    for i in range(B):
        parts.update(q[i : i + 1], k[i : i + 1], output=out[i : i + 1])
    expected = reference(scores_of(q, k), torch.ones(L, S, dtype=torch.bool))
    for heads in (whole, merged, parts):
        check(heads, expected)
        found = heads.responsibility().heads
        assert found is not None
        norms = torch.linalg.vector_norm(out.double(), dim=-1).mean((0, 2))
        for head, norm in zip(found, norms / norms.mean(), strict=True):
            assert head.output_norm == pytest.approx(float(norm), rel=1e-5)


def test_more_keys_than_expected_keep_mean_and_extremes_exact() -> None:
    heads = AttentionHeads(1, 4, T)
    heads.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 50, 2))
    found = heads.responsibility()
    assert found.entropy.mean == pytest.approx(math.log(50), rel=1e-6)
    assert found.entropy.median == pytest.approx(math.log(50), rel=1e-6)
    assert found.normalized_entropy == pytest.approx(1, rel=1e-6)


def test_values_that_are_not_finite_are_told_and_left_out() -> None:
    q, k, _ = inputs()
    q[1, 2, 3] = math.nan
    for explicit in (False, True):
        heads = AttentionHeads(H, 64, T)
        if explicit:
            heads.update_scores(scores_of(q, k).float())
        else:
            heads.update(q, k)
        assert heads.nonfinite
        found = heads.responsibility()
        assert found.competitions == B * H * L - 1
        assert found.normalized_entropy is not None
        assert math.isfinite(found.normalized_entropy)


def test_attention_to_a_single_key_is_no_competition() -> None:
    heads = AttentionHeads(1, 1, T)
    heads.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 1, 4))
    found = heads.responsibility()
    assert found.competitions == 6
    assert found.normalized_entropy is None


@pytest.mark.parametrize("length", [1.0, 2.0, 4.8, 4.9, 8.0])  # scores up to length^2 / 4: 4.9 is just beyond MILD
def test_scores_whose_bound_allows_it_need_no_maximum(length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    mild = []
    see = module.Queries.see_mild
    monkeypatch.setattr(module.Queries, "see_mild", lambda *args: (mild.append(1), see(*args))[1])
    q, k = (F.normalize(torch.randn(2, heads, n, 16), dim=-1) * length for heads, n in ((4, 300), (2, 600)))
    q[0, 0], k[0, 0, 1:] = k[0, 0, 0], -k[0, 0, 0]  # as near to hard as such scores come
    heads = AttentionHeads(4, 600, Thresholds())
    heads.update(q, k)
    r = (q.double() @ k.repeat_interleave(2, 1).double().mT / 4).softmax(-1)
    entropy = -(r * r.log()).sum(-1).mean((0, 2)) / math.log(600)
    found = heads.responsibility().heads or []
    assert [head.normalized_entropy for head in found] == pytest.approx(entropy.tolist(), rel=1e-4)
    assert [head.first_key for head in found] == pytest.approx(r[..., 0].mean((0, 2)).tolist(), rel=1e-4)
    assert heads.largest.mean == pytest.approx(float(r.amax(-1).mean()), rel=1e-4)
    assert bool(mild) == (length**2 / 4 <= module.MILD)
