"""Codebooks: who is chosen how often, by row of each codebook, against float64 distances; perplexity and dead codes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emscan

K, D = 24, 6


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    return z + (q - z).detach()


class Coded(nn.Module):
    """Encoder, one codebook, decoder; ``nearest`` gives the indices, ``lookup`` the codes."""

    def __init__(self, nearest, lookup=F.embedding) -> None:
        super().__init__()
        self.enc, self.code, self.dec = nn.Linear(9, D), nn.Embedding(K, D), nn.Linear(D, 9)
        self.nearest, self.lookup = nearest, lookup

    def forward(self, x):
        z = self.enc(x)
        return self.dec(straight_through(z, self.lookup(self.nearest(z, self.code.weight), self.code.weight)))

    def expected(self, x):
        return [torch.cdist(self.enc(x).double(), self.code.weight.double()).argmin(-1)]


class Cosine(Coded):
    def __init__(self) -> None:
        super().__init__(lambda z, w: (F.normalize(z, dim=-1) @ F.normalize(w, dim=-1).T).argmax(-1))

    def expected(self, x):
        return [
            (F.normalize(self.enc(x).double(), dim=-1) @ F.normalize(self.code.weight.double(), dim=-1).T).argmax(-1)
        ]


class Averaged(nn.Module):
    """The codebook is a buffer that training moves by averages."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(9, D), nn.Linear(D, 9)
        self.register_buffer("embed", torch.randn(K, D))
        self.register_buffer("cluster_size", torch.ones(K))

    def forward(self, x):
        z = self.enc(x)
        chosen = torch.cdist(z, self.embed).argmin(-1)
        if self.training:
            counts = F.one_hot(chosen, K).to(z.dtype)
            self.cluster_size.mul_(0.9).add_(counts.sum(0), alpha=0.1)
            self.embed.lerp_(counts.T @ z / self.cluster_size.unsqueeze(-1), 0.1)
        return self.dec(straight_through(z, self.embed[chosen]))

    def expected(self, x):
        return [torch.cdist(self.enc(x).double(), self.embed.double()).argmin(-1)]


class Kept(Averaged):
    """The codebook is worked out from averages once, and kept as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        sums, counts = torch.randn(K, D), torch.rand(K, 1) + 0.5
        del self.embed
        self.embed = (sums / counts).detach()


class Residual(nn.Module):
    """Stages over what is left: with one codebook each, with one for all, or with slices of one tensor."""

    def __init__(self, kind: str, stages: int = 3) -> None:
        super().__init__()
        self.enc, self.dec, self.kind, self.stages = nn.Linear(9, D), nn.Linear(D, 9), kind, stages
        if kind == "stacked":
            self.books = nn.Parameter(torch.randn(stages, K, D))
        else:
            self.books = nn.ParameterList([torch.randn(K, D) for _ in range(stages if kind == "separate" else 1)])

    def forward(self, x):
        z = self.enc(x)
        left, total = z, 0
        for stage in range(self.stages):
            w = self.books[stage % len(self.books)]
            q = w[torch.cdist(left, w).argmin(-1)]
            left, total = left - q, total + q
        return self.dec(straight_through(z, total))

    def expected(self, x):
        left, found = self.enc(x).double(), []
        for stage in range(self.stages):
            w = self.books[stage % len(self.books)].double()
            found.append(torch.cdist(left, w).argmin(-1))
            left = left - w[found[-1]]
        return found


class Product(nn.Module):
    """Groups of features, each with a codebook of its own in one tensor, or all with the same."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.enc, self.dec, self.kind = nn.Linear(9, D), nn.Linear(D, 9), kind
        self.books = nn.Parameter(torch.randn(*([] if kind == "shared" else [3]), K, D // 3))

    def forward(self, x):
        z = self.enc(x).unflatten(-1, (3, D // 3))
        w = self.books
        if self.kind == "shared":
            q = w[torch.cdist(z, w).argmin(-1)]
        elif self.kind == "broadcast":
            chosen = ((z.unsqueeze(-2) - w) ** 2).sum(-1).argmin(-1)
            q = torch.stack([w[g][chosen[..., g]] for g in range(3)], -2)
        elif self.kind == "batched":
            chosen = torch.cdist(z.transpose(0, 1), w).argmin(-1)
            q = w.gather(1, chosen.unsqueeze(-1).expand(-1, -1, D // 3)).transpose(0, 1)
        else:
            chosen = (2 * torch.einsum("ngd,gkd->ngk", z, w) - w.square().sum(-1)).argmax(-1)
            q = w[torch.arange(3), chosen]
        return self.dec(straight_through(z, q).flatten(-2))

    def expected(self, x):
        z = self.enc(x).double().unflatten(-1, (3, D // 3))
        if self.kind == "shared":
            return [torch.cdist(z, self.books.double()).argmin(-1)]
        return [torch.cdist(z[:, g], self.books[g].double()).argmin(-1) for g in range(3)]


def written_out(z, w):
    return (z.pow(2).sum(-1, keepdim=True) - 2 * z @ w.T + w.pow(2).sum(-1)).argmin(-1)


QUANTIZERS = {
    "cdist": lambda: Coded(lambda z, w: torch.cdist(z, w).argmin(-1)),
    "written out": lambda: Coded(written_out),
    "inner product": lambda: Coded(lambda z, w: (2 * z @ w.T - w.square().sum(-1)).max(-1).indices),
    "broadcast, one-hot": lambda: Coded(
        lambda z, w: ((z.unsqueeze(-2) - w) ** 2).sum(-1).argmin(-1), lambda i, w: F.one_hot(i, K).float() @ w
    ),
    "top-1": lambda: Coded(lambda z, w: torch.cdist(z, w).topk(1, largest=False).indices.squeeze(-1)),
    "sorted": lambda: Coded(lambda z, w: torch.cdist(z, w).sort(-1).indices[..., 0]),
    "cosine": Cosine,
    "averaged": Averaged,
    "kept": Kept,
    "residual, separate": lambda: Residual("separate"),
    "residual, tied": lambda: Residual("tied"),
    "residual, stacked": lambda: Residual("stacked"),
    "product, broadcast": lambda: Product("broadcast"),
    "product, batched": lambda: Product("batched"),
    "product, einsum": lambda: Product("einsum"),
    "product, shared": lambda: Product("shared"),
}


def code_rows(report):
    return [layer for layer in report.layers if layer.mechanism == "selection"]


def counts_of(indices):
    return torch.bincount(indices.flatten(), minlength=K).double()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_usage_perplexity_and_dead_codes(name: str) -> None:
    model, x = QUANTIZERS[name](), torch.randn(130, 9)
    with torch.no_grad():
        found = model.expected(x)
    report = emscan.audit(model, x, batch_size=50)
    rows = code_rows(report)
    assert all(row.alternatives.kind == "codes" and row.alternatives.count == K for row in rows)
    if "separate" in name:
        books = [[counts_of(one)] for one in found]
    elif "tied" in name:
        books = [[sum(counts_of(one) for one in found)]]
    else:
        books = [[counts_of(one) for one in found]]
    assert len(rows) == len(books)
    for row, counts in zip(rows, books, strict=True):
        whole = torch.cat(counts)
        parts = row.components
        assert parts.count == len(whole)
        load = whole / whole.sum()
        assert parts.load == pytest.approx(load.tolist(), abs=1e-12)
        assert parts.mass == whole.tolist()
        assert parts.dead == (whole == 0).nonzero().flatten().tolist()
        assert parts.upper_bound == (pytest.approx(1 - 0.05 ** (1 / 130)) if parts.dead else None)
        perplexity = math.exp(-float(torch.special.xlogy(load, load).sum()))
        assert row.responsibility.effective_components == pytest.approx(perplexity)
        assert row.responsibility.competitions == int(whole.sum())
        assert row.responsibility.temperature is None
        assert len(parts.variance) == parts.count
    assert ("EM105" in {f.rule for f in report.findings}) == any(row.components.dead for row in rows)


@pytest.mark.parametrize("kind", ["round", "sign"])
def test_without_a_lookup_nothing_competes(kind: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.dec = nn.Linear(9, D), nn.Linear(D, 9)

        def forward(self, x):
            z = self.enc(x)
            q = z.round() if kind == "round" else torch.where(z > 0, 1.0, -1.0)
            return self.dec(straight_through(z, q))

    report = emscan.audit(Plain(), torch.randn(20, 9))
    assert not code_rows(report)
    assert not [layer for layer in report.layers if layer.verdict == "em"]


def test_variance_and_redundancy_of_code_distances() -> None:
    model, x = QUANTIZERS["cdist"](), torch.randn(300, 9)
    parts = code_rows(emscan.audit(model, x))[0].components
    with torch.no_grad():
        d = torch.cdist(model.enc(x).double(), model.code.weight.double())
    assert parts.variance == pytest.approx(d.var(0, correction=0).tolist(), rel=1e-4)
    energy = float(torch.corrcoef(d.T).square().sum()) - K
    assert parts.correlation_energy == pytest.approx(energy, rel=1e-4)
    assert parts.redundancy == pytest.approx(energy / (K * (K - 1)), rel=1e-4)


def test_a_trained_codebook_and_codes_that_were_left_behind() -> None:
    centres = torch.randn(8, 9) * 4
    x = (centres[torch.randint(0, 8, (600,))] + 0.1 * torch.randn(600, 9)).detach()
    model = Coded(lambda z, w: torch.cdist(z, w).argmin(-1))
    with torch.no_grad():  # codes start on data, except for the last ones, which are far off
        model.code.weight[:16] = model.enc(x[:16])
        model.code.weight[16:] += 50
    step = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        step.zero_grad()
        z = model.enc(x)
        q = model.code(torch.cdist(z, model.code.weight).argmin(-1))
        loss = (
            F.mse_loss(model.dec(straight_through(z, q)), x)
            + F.mse_loss(q, z.detach())
            + 0.2 * F.mse_loss(z, q.detach())
        )
        loss.backward()
        step.step()
    row = code_rows(emscan.audit(model, x))[0]
    assert set(range(16, K)) <= set(row.components.dead)
    assert 4 < row.responsibility.effective_components < 16


class Grouped(nn.Module):
    """Groups of scores, each with its own choice: classes of several heads in one weight."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.proj, self.first = nn.Linear(9, 2 * K), first
        self.codes = nn.Parameter(torch.randn(2 * K, 3))

    def forward(self, x):
        scores = self.proj(x)
        scores = scores.view(-1, 2, K) if self.first else scores.view(-1, K)  # as wav2vec 2 does
        r = scores.softmax(-1)
        return (r.reshape(-1, 2, K, 1) * self.codes.view(2, K, 3)).sum(-2).flatten(-2)


@pytest.mark.parametrize("first", [True, False])
def test_groups_of_one_weight_are_apart(first: bool) -> None:
    model, x = Grouped(first), torch.randn(90, 9)
    report = emscan.audit(model, x, batch_size=40)
    row = next(layer for layer in report.layers if layer.mechanism == "softmax")
    with torch.no_grad():
        z = model.proj(x).double()
        r = z.view(-1, 2, K).softmax(-1)
    parts = row.components
    assert (row.alternatives.count, parts.count) == (K, 2 * K)
    assert parts.load == pytest.approx((r.mean(0).flatten() / 2).tolist(), rel=1e-4)
    assert parts.mass == pytest.approx(r.sum(0).flatten().tolist(), rel=1e-4)
    assert parts.variance == pytest.approx(z.var(0, correction=0).tolist(), rel=1e-4)
    h = -torch.special.xlogy(r, r).sum(-1)
    mean = r.mean(0)
    information = float((-torch.special.xlogy(mean, mean).sum(-1)).mean() - h.mean())
    assert row.responsibility.information == pytest.approx(information, rel=1e-4)
    assert row.responsibility.competitions == 180


@pytest.mark.parametrize("name", ["cdist", "residual, stacked", "product, batched"])
def test_any_batch_size_gives_one_report(name: str) -> None:
    model, x = QUANTIZERS[name](), torch.randn(120, 9)
    whole = [row.components for row in code_rows(emscan.audit(model, x, batch_size=120))]
    for size in (7, 50):
        for one, row in zip(whole, code_rows(emscan.audit(model, x, batch_size=size)), strict=True):
            parts = row.components
            assert (parts.load, parts.dead, parts.mass) == (one.load, one.dead, one.mass)
            assert parts.variance == pytest.approx(one.variance, rel=1e-4)
            assert parts.redundancy == pytest.approx(one.redundancy, rel=1e-4)


def test_the_hard_choice_of_groups_is_one_of_codes() -> None:
    """As wav2vec 2 quantizes: groups in the batch, a one-hot product written out."""

    class Hard(Grouped):
        def forward(self, x):
            scores = self.proj(x).view(-1, K)
            chosen = torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
            rows = chosen.view(len(x), -1).unsqueeze(-1) * self.codes
            return rows.view(len(x), 2, K, 3).sum(-2).flatten(-2)

    model, x = Hard(first=False), torch.randn(70, 9)
    row = code_rows(emscan.audit(model, x, batch_size=30))[0]
    with torch.no_grad():
        chosen = model.proj(x).view(-1, 2, K).argmax(-1)
    expected = torch.cat([counts_of(chosen[:, group]) for group in range(2)])
    assert (row.alternatives.kind, row.components.mass) == ("codes", expected.tolist())
