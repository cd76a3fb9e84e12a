"""Per-head statistics in a whole audit: one network in many spellings, against attention written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan
from emscan.report.document import Layer

N, L, WIDTH, HEADS, GROUPS = 6, 11, 24, 4, 2
SIZE = WIDTH // HEADS


class Attention(nn.Module):
    """Self-attention with four heads over two groups of keys; ``spelling`` mixes q (N, L, H, E) with k, v (N, L, G, E)."""

    def __init__(self, spelling: Callable[..., Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, GROUPS * SIZE), nn.Linear(WIDTH, GROUPS * SIZE)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = self.query, self.key, self.value
        q, k, v = (layer(x).unflatten(-1, (-1, SIZE)) for layer in layers)
        return 2 * q, k, v

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        return self.out(self.spelling(*self.heads(x), shown).flatten(-2))


def repeated(k: Tensor) -> Tensor:
    return k.repeat_interleave(HEADS // GROUPS, 2)


def fused(q, k, v, shown):
    q, k, v = (t.transpose(1, 2) for t in (q, repeated(k), repeated(v)))
    mask = None if shown is None else shown[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def grouped(q, k, v, shown):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if shown is None else torch.where(shown, 0.0, -math.inf)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def merged(q, k, v, shown):
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, repeated(k), repeated(v)))
    mask = None if shown is None else shown.repeat_interleave(HEADS, 0)[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask).unflatten(0, (-1, HEADS)).transpose(1, 2)


def heads_first(q, k, v, shown):
    q, k, v = (t.permute(2, 0, 1, 3).flatten(0, 1) for t in (q, repeated(k), repeated(v)))
    mask = None if shown is None else shown.repeat(HEADS, 1)[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask).unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3)


def matmul(q, k, v, shown):
    q, k, v = (t.transpose(1, 2) for t in (q, repeated(k), repeated(v)))
    scores = q @ k.transpose(-2, -1) / SIZE**0.5
    if shown is not None:
        scores = scores + torch.where(shown, 0.0, -1e9)[:, None, None]
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def bmm(q, k, v, shown):
    q, k, v = (t.transpose(1, 2).reshape(-1, L, SIZE) for t in (q, repeated(k), repeated(v)))
    scores = torch.bmm(q / SIZE**0.5, k.transpose(1, 2))
    if shown is not None:
        scores = scores.masked_fill(~shown.repeat_interleave(HEADS, 0)[:, None], -math.inf)
    return torch.bmm(F.softmax(scores, -1), v).view(-1, HEADS, L, SIZE).transpose(1, 2)


def einsum(q, k, v, shown):
    scores = torch.einsum("nqhe,nkhe->nqhk", q, repeated(k)) / SIZE**0.5
    if shown is not None:
        scores = scores.masked_fill(~shown[:, None, None], -math.inf)
    return torch.einsum("nqhk,nkhe->nqhe", scores.softmax(-1), repeated(v))


def grouped_einsum(q, k, v, shown):
    scores = torch.einsum("nqgre,nkge->nkgrq", q.unflatten(2, (GROUPS, -1)), k) / SIZE**0.5
    if shown is not None:
        scores = scores.masked_fill(~shown[:, :, None, None, None], -math.inf)
    return torch.einsum("nkgrq,nkge->nqgre", scores.softmax(1), v).flatten(2, 3)


def by_hand(q, k, v, shown):
    q, k, v = (t.transpose(1, 2) for t in (q, repeated(k), repeated(v)))
    scores = q @ k.transpose(-2, -1) / SIZE**0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    if shown is not None:
        weights = weights * shown[:, None, None]
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2)


SPELLINGS = [fused, grouped, merged, heads_first, matmul, bmm, einsum, grouped_einsum, by_hand]


def oracle(model: Attention, x: Tensor, shown: Tensor | None) -> dict[str, list[float]]:
    """Statistics of every head in float64."""
    exact = Attention(model.spelling).double()
    exact.load_state_dict(model.double().state_dict())
    model.float()
    with torch.no_grad():
        q, k, v = exact.heads(x.double())
        scores = torch.einsum("nqhe,nkhe->nhqk", q, repeated(k)) / SIZE**0.5
        real = torch.ones(x.shape[:2], dtype=torch.bool) if shown is None else shown
        scores = scores.masked_fill(~real[:, None, None], -math.inf)
        r = scores.softmax(-1)
        queries = real[:, None].expand(-1, HEADS, -1)  # those of padding do not count
        count = queries.sum((0, 2))
        h = torch.special.entr(r).sum(-1) / real.sum(-1)[:, None, None].double().log()
        norm = torch.linalg.vector_norm(r @ repeated(v).transpose(1, 2), dim=-1)
        found = {
            "normalized_entropy": h, "first_key": r[..., 0], "diagonal": r.diagonal(0, -2, -1), "output_norm": norm,
            "hard_fraction": (r.amax(-1) >= 0.99).double(),
        }  # fmt: skip
        means = {name: (value * queries).sum((0, 2)) / count for name, value in found.items()}
    means["output_norm"] /= means["output_norm"].mean()
    return {name: value.tolist() for name, value in means.items()}


def attention_row(report: emscan.Report) -> Layer:
    (row,) = (layer for layer in report.layers if layer.alternatives is not None and layer.alternatives.kind == "keys")
    return row


def made(spelling: Callable[..., Tensor]) -> tuple[Attention, Tensor]:
    torch.manual_seed(5)
    return Attention(spelling).eval(), torch.randn(N, L, WIDTH)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_heads_in_every_spelling(spelling: Callable[..., Tensor], padded: bool) -> None:
    model, x = made(spelling)
    shown = torch.arange(L) < torch.tensor([11, 4, 7, 2, 9, 11])[:, None] if padded else None
    inputs = (x, shown) if padded else x
    expected = oracle(model, x, shown)
    row = attention_row(emscan.audit(model, inputs, batch_size=4))
    assert row.mechanism == "softmax"
    assert row.responsibility is not None
    found = row.responsibility.heads
    assert found is not None
    assert len(found) == HEADS
    for name, values in expected.items():
        assert [getattr(head, name) for head in found] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    total = int(shown.sum()) if shown is not None else N * L
    assert row.responsibility.competitions == HEADS * total
    assert row.responsibility.sampled is None


@pytest.mark.parametrize("weights", [False, True])
def test_torch_multi_head_attention(weights: bool) -> None:
    """Its weights lie at (N * H, L, S) where they are asked for, and nowhere where they are not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=weights)[0]

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(N, L, WIDTH)
    _, r = net.attention(x, x, x, need_weights=True, average_attn_weights=False)
    row = attention_row(emscan.audit(net, x, batch_size=2))
    assert row.responsibility is not None
    assert row.responsibility.heads is not None
    expected = (torch.special.entr(r.double()).sum(-1) / math.log(L)).mean((0, 2)).tolist()
    assert [h.normalized_entropy for h in row.responsibility.heads] == pytest.approx(expected, rel=1e-4)
    assert all(h.output_norm is not None for h in row.responsibility.heads)


def test_learned_queries_are_no_heads() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(5, WIDTH))
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q = self.query(self.latents).expand(len(x), -1, -1)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, self.key(x), self.value(x)))
            return torch.softmax(q @ k.transpose(-2, -1), -1) @ v

    torch.manual_seed(0)
    row = attention_row(emscan.audit(Pool().eval(), torch.randn(N, L, WIDTH)))
    assert row.responsibility is not None
    assert row.responsibility.heads is not None
    assert len(row.responsibility.heads) == HEADS
    assert row.responsibility.competitions == N * HEADS * 5


def test_as_many_encoded_positions_as_queries_are_not_taken_for_padding() -> None:
    """A mask over another sequence's keys hides keys, and no query of this one."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor, memory: Tensor, shown: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for t in (self.query(x), self.key(memory), self.value(memory))
            )
            return F.scaled_dot_product_attention(q, k, v, shown[:, None, None])

    shown = (torch.arange(L) < 6).expand(N, L)
    report = emscan.audit(Cross().eval(), (torch.randn(N, L, WIDTH), torch.randn(N, L, WIDTH), shown))
    row = attention_row(report)
    assert row.responsibility is not None
    assert row.responsibility.competitions == N * HEADS * L


@pytest.mark.parametrize("spelling", [fused, matmul], ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_are_sampled(spelling: Callable[..., Tensor], causal: bool, monkeypatch) -> None:
    from emscan.measure import queries

    monkeypatch.setattr(queries, "EXACT", 10)
    monkeypatch.setattr(queries, "SAMPLED", 4)
    torch.manual_seed(5)
    length = 64

    def causally(q, k, v, shown):
        q, k, v = (t.transpose(1, 2) for t in (q, repeated(k), repeated(v)))
        if spelling is fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / SIZE**0.5
        return (torch.softmax(scores + torch.full((length, length), -math.inf).triu(1), -1) @ v).transpose(1, 2)

    model, x = Attention(causally if causal else spelling).eval(), torch.randn(3, length, WIDTH)
    row = attention_row(emscan.audit(model, x, batch_size=2))
    found = row.responsibility
    assert found is not None
    assert found.heads is not None
    assert found.sampled == 3 * HEADS * 4
    assert found.competitions == 3 * HEADS * length
    places = [8, 24, 40, 56]
    with torch.no_grad():
        q, k, _ = model.heads(x)
        scores = torch.einsum("nqhe,nkhe->nhqk", q.double(), repeated(k).double()) / SIZE**0.5
        if causal:
            scores = scores + torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
        r = scores.softmax(-1)[:, :, places]
        seen = torch.tensor(places) + 1 if causal else torch.full((4,), length)
        h = torch.special.entr(r).sum(-1) / seen.log()
    assert [head.normalized_entropy for head in found.heads] == pytest.approx(h.mean((0, 2)).tolist(), rel=1e-4)
    assert row.note is not None
    assert "sampled" in row.note


def test_sixteen_thousand_keys() -> None:
    torch.manual_seed(0)
    model = Attention(fused).eval()
    row = attention_row(emscan.audit(model, torch.randn(1, 16_384, WIDTH)))
    assert row.evidence is not None
    assert row.evidence.sum_error is not None
    assert row.evidence.gradient_error is not None
    assert row.evidence.tolerance is not None
    assert max(row.evidence.sum_error, row.evidence.gradient_error) <= row.evidence.tolerance
    assert row.responsibility is not None
    assert row.responsibility.sampled == HEADS * 512


class Square(nn.Module):
    """As many samples as heads as positions; ``spelling`` as above, ``heads`` of any number."""

    def __init__(self, width: int, heads: int, fused_: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused_
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def split(self, x: Tensor) -> list[Tensor]:
        layers = self.query, self.key, self.value
        return [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


@pytest.mark.parametrize("fused_", [True, False], ids=["fused", "written"])
@pytest.mark.parametrize(("samples", "heads", "length"), [(4, 4, 4), (1, 4, 1 + 4), (1, 1, 6), (5, 1, 5), (2, 3, 2)])
def test_sizes_decide_nothing(samples: int, heads: int, length: int, fused_: bool) -> None:
    torch.manual_seed(1)
    net, x = Square(12, heads, fused_).eval(), torch.randn(samples, length, 12)
    row = attention_row(emscan.audit(net, x))
    with torch.no_grad():
        q, k, v = (t.double() for t in net.split(x))
        s = q @ k.transpose(-2, -1)
        norm = torch.linalg.vector_norm(s.softmax(-1) @ v, dim=-1).mean((0, 2))
    h = {scale: torch.special.entr((scale * s).softmax(-1)).sum(-1) / math.log(length) for scale in (0.5, 1.0, 2.0)}
    spread = row.responsibility
    assert spread is not None
    assert spread.heads is not None
    assert spread.competitions == samples * heads * length
    assert [head.normalized_entropy for head in spread.heads] == pytest.approx(h[1.0].mean((0, 2)).tolist(), rel=1e-4)
    assert [head.output_norm for head in spread.heads] == pytest.approx((norm / norm.mean()).tolist(), rel=1e-4)
    assert spread.temperature is not None
    assert spread.temperature.half == pytest.approx(float(h[0.5].mean()), rel=1e-4)
    assert spread.temperature.double == pytest.approx(float(h[2.0].mean()), rel=1e-4)


@pytest.mark.parametrize("fused_", [True, False], ids=["fused", "written"])
@pytest.mark.parametrize("length", [8, 17, 40])
def test_other_temperatures_of_some_queries(length: int, fused_: bool) -> None:
    """About eight queries of a sequence, evenly spaced from the first on."""
    torch.manual_seed(1)
    net, x = Square(12, 3, fused_).eval(), torch.randn(4, length, 12)
    spread = attention_row(emscan.audit(net, x)).responsibility
    with torch.no_grad():
        q, k, _ = (t.double() for t in net.split(x))
    s = (q @ k.transpose(-2, -1))[:, :, :: length // 8]
    assert spread is not None
    assert spread.temperature is not None
    for scale, found in ((0.5, spread.temperature.half), (2.0, spread.temperature.double)):
        h = torch.special.entr((scale * s).softmax(-1)).sum(-1) / math.log(length)
        assert found == pytest.approx(float(h.mean()), rel=1e-4)
    assert spread.temperature.sampled == (4 * 3 * s.shape[2] if s.shape[2] < length else None)


@pytest.mark.parametrize("fused_", [True, False], ids=["fused", "written"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype, fused_: bool) -> None:
    """From what the model computed: queries and keys where they are at hand, else its own rounded scores."""
    torch.manual_seed(1)
    net, x = Square(12, 3, fused_).eval().to(dtype), torch.randn(4, 9, 12).to(dtype)
    spread = attention_row(emscan.audit(net, x)).responsibility
    with torch.no_grad():
        q, k, _ = net.split(x)
        s = q.double() @ k.double().transpose(-2, -1) if fused_ else (q @ k.transpose(-2, -1)).double()
    h = torch.special.entr(s.softmax(-1)).sum(-1) / math.log(9)
    assert spread is not None
    assert spread.heads is not None
    assert [head.normalized_entropy for head in spread.heads] == pytest.approx(h.mean((0, 2)).tolist(), rel=1e-4)


@pytest.mark.parametrize("fused_", [True, False], ids=["fused", "written"])
def test_a_sample_of_nan_leaves_the_others_right(fused_: bool) -> None:
    torch.manual_seed(1)
    net, x = Square(12, 3, fused_).eval(), torch.randn(4, 9, 12)
    bad = x.clone()
    bad[2] = math.nan
    clean, found = (attention_row(emscan.audit(net, t)).responsibility for t in (x[[0, 1, 3]], bad))
    assert clean is not None
    assert found is not None
    assert found.competitions == clean.competitions == 3 * 3 * 9
    assert clean.heads is not None
    assert found.heads is not None
    for name in ("normalized_entropy", "first_key", "diagonal", "hard_fraction", "output_norm"):
        values = [getattr(head, name) for head in clean.heads]
        assert [getattr(head, name) for head in found.heads] == pytest.approx(values, rel=1e-5), name


def test_a_bias_that_layers_compute_does_not_make_learned_queries_heads() -> None:
    """The bias brings axes of its own to the scores, which are named after it or after queries and keys."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(5, WIDTH))
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.bias = nn.Linear(WIDTH, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            latents = torch.cat([self.latents[:1], self.latents[1:] * 2])
            near = self.bias(torch.tanh(latents[1:, None] * x[:, None])).permute(0, 3, 1, 2)
            q = self.query(latents).expand(len(x), -1, -1)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, self.key(x), self.value(x)))
            return torch.softmax(q @ k.transpose(-2, -1) + F.pad(near, (0, 0, 1, 0)), -1) @ v

    torch.manual_seed(0)
    row = attention_row(emscan.audit(Cross().eval(), torch.randn(N, L, WIDTH)))
    assert row.responsibility is not None
    assert row.responsibility.heads is not None
    assert len(row.responsibility.heads) == HEADS
    assert row.responsibility.competitions == N * HEADS * 5
