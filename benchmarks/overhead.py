"""Time and peak memory of an audit over a plain forward of the same probe: `python benchmarks/overhead.py`.

Both run under `inference_mode` on the same batches, in turn (A B A B ...) so that a busy machine slows both; the ratio
is that of the medians. Peak memory is the largest resident set of a process that does nothing else, one process per
measurement, imports included. One warm-up of each is left out, so the time of imports is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, its probe and the batch size."""

    title: str
    network: Callable[[], nn.Module]
    probe: Callable[[], Tensor]
    batch_size: int
    repeats: int


class Convolutional(nn.Module):
    """Eight 3 x 3 convolutions of 64 to 256 channels, each with BatchNorm and ReLU; images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 64, 64, 128, 128, 256, 256, 256, 256]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


class EncoderLayer(nn.Module):
    """Post-norm attention and feed-forward, as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids (N, 128) -> (N, 2): 6 layers, width 384, 6 heads, GELU."""

    def __init__(self, vocabulary: int = 8192, width: int = 384, depth: int = 6, tokens: int = 128) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, 6) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class Routed(nn.Module):
    """Mixtral's feed-forward: softmax over 8 experts, the best 2 renormalized, SwiGLU experts in a loop; (N, 64, 256)."""

    def __init__(self, width: int = 256, inner: int = 512, experts: int = 8) -> None:
        super().__init__()
        self.experts = experts
        self.embed, self.router = nn.Linear(32, width), nn.Linear(width, experts, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(experts, width, inner) / 16) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, inner, width) / 23)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(0, 1)
        share, chosen = self.router(tokens).softmax(-1).topk(2, -1)
        share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for expert in range(self.experts):
            token, place = torch.where(chosen == expert)
            some = tokens[token]
            some = (F.silu(some @ self.gate[expert]) * (some @ self.up[expert])) @ self.down[expert]
            out.index_add_(0, token, some * share[token, place, None])
        return self.head(out.unflatten(0, x.shape[:2]).mean(1))


class Quantizer(nn.Module):
    """Convolutional autoencoder of (N, 3, 32, 32) images through the nearest of 512 codes at 8 x 8 places."""

    def __init__(self, codes: int = 512, width: int = 64) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip
        self.codes = nn.Parameter(torch.randn(codes, width))
        self.up = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(width, width, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        z = self.down(images).movedim(1, -1)
        nearest = torch.cdist(z.flatten(0, 2), self.codes).argmin(-1)
        return self.up(F.embedding(nearest, self.codes).view_as(z).movedim(-1, 1))


def perceptron() -> nn.Module:
    """Return a small classifier with two hidden layers."""
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def images() -> Tensor:
    """Return 256 images."""
    return torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def many_images() -> Tensor:
    """Return 2,048 images."""
    return torch.randn(2048, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def ids() -> Tensor:
    """Return 192 sequences of 128 token ids."""
    return torch.randint(0, 8192, (192, 128), generator=torch.Generator().manual_seed(1))


def encoder_of(tokens: int) -> Callable[[], nn.Module]:
    """Return the maker of an encoder with two layers for sequences of so many tokens."""
    return lambda: Encoder(depth=2, tokens=tokens)


def sequences(count: int, tokens: int) -> Callable[[], Tensor]:
    """Return the maker of so many sequences of token ids."""
    return lambda: torch.randint(0, 8192, (count, tokens), generator=torch.Generator().manual_seed(1))


def features() -> Tensor:
    """Return 2,048 sequences of 64 vectors."""
    return torch.randn(2048, 64, 32, generator=torch.Generator().manual_seed(1))


def vectors() -> Tensor:
    """Return a million samples."""
    return torch.randn(1_000_000, 32, generator=torch.Generator().manual_seed(1))


CASES = {
    "cnn": Case("CNN, 8 convolutions, 64 to 256 channels, 256 images of 32 x 32", Convolutional, images, 64, 5),
    "encoder": Case("encoder, 6 layers, width 384, 192 sequences of 128 tokens", Encoder, ids, 16, 5),
    "attention-512": Case(
        "encoder, 2 layers, width 384, 64 sequences of 512 tokens", encoder_of(512), sequences(64, 512), 8, 5
    ),
    "attention-2048": Case(
        "encoder, 2 layers, width 384, 24 sequences of 2,048 tokens", encoder_of(2048), sequences(24, 2048), 2, 5
    ),
    "attention-8192": Case(
        "encoder, 2 layers, width 384, 8 sequences of 8,192 tokens", encoder_of(8192), sequences(8, 8192), 1, 3
    ),
    "router": Case("2 of 8 experts, as in Mixtral, width 256, 2,048 sequences of 64 vectors", Routed, features, 32, 5),
    "codes": Case("VQ autoencoder, 512 codes, 2,048 images of 32 x 32", Quantizer, many_images, 32, 5),
    "mlp": Case("MLP 32-128-128-10, 1,000,000 samples", perceptron, vectors, 8192, 5),
}


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """Return the network in eval mode and the probe, the same at every call."""
    torch.manual_seed(0)
    return case.network().eval(), case.probe()


def plain(model: nn.Module, probe: Tensor, case: Case) -> None:
    """Run the network on every batch."""
    with torch.inference_mode():
        for batch in probe.split(case.batch_size):
            model(batch)


def audited(model: nn.Module, probe: Tensor, case: Case) -> None:
    """Audit the network on the same batches."""
    import emscan

    report = emscan.audit(model, probe, batch_size=case.batch_size)
    assert report.probe.samples == len(probe)


RUNS = {"plain": plain, "audit": audited}


def timed(case: Case, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each run, plain and audit in turn."""
    model, probe = build(case)
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for repeat in range(repeats + 1):
        for name, run in RUNS.items():
            start = time.perf_counter()
            run(model, probe, case)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peaks(name: str, repeats: int, threads: int) -> dict[str, list[float]]:
    """Return the peak resident memory of each run in MiB, one process per measurement."""
    found: dict[str, list[float]] = {kind: [] for kind in RUNS}
    for _ in range(repeats):
        for kind in RUNS:
            command = [sys.executable, __file__, "--peak", kind, "--case", name, "--threads", str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[kind].append(float(done.stdout))
    return found


def peak(kind: str, name: str) -> float:
    """Do one run and return the peak resident memory of this process in MiB."""
    case = CASES[name]
    RUNS[kind](*build(case), case)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss of a new process starts at its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def ratio(values: dict[str, list[float]]) -> dict[str, float]:
    """Return both medians, their ratio, and the range of the ratios of neighbouring runs."""
    pairs = [audit / alone for alone, audit in zip(values["plain"], values["audit"], strict=True)]
    alone, audit = statistics.median(values["plain"]), statistics.median(values["audit"])
    return {"plain": alone, "audit": audit, "ratio": audit / alone, "lowest": min(pairs), "highest": max(pairs)}


def main() -> None:
    """Measure the cases asked for and print a line for each quantity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="one case; may be repeated (default: all)")
    parser.add_argument("--repeats", type=int, help="timed pairs per case (default: 5)")
    parser.add_argument("--memory-repeats", type=int, default=3, help="processes per kind for peak memory (0: none)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.add_argument("--peak", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.case or list(CASES)
    if options.peak:
        print(peak(options.peak, names[0]))
        return
    results = {}
    for name in names:
        case = CASES[name]
        results[name] = {"time": ratio(timed(case, options.repeats or case.repeats))}
        if options.memory_repeats:
            results[name]["memory"] = ratio(peaks(name, options.memory_repeats, options.threads))
        if not options.json:
            show(case, results[name])
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": options.threads, "cases": results}, indent=2))


def show(case: Case, measured: dict[str, dict[str, float]]) -> None:
    """Print what was measured for one case."""
    print(case.title)
    for quantity, unit in (("time", "s"), ("memory", "MiB")):
        if quantity in measured:
            m = measured[quantity]
            digits = 3 if unit == "s" else 0
            print(
                f"  {quantity:6}  audit {m['audit']:.{digits}f} {unit} / plain {m['plain']:.{digits}f} {unit}"
                f" = {m['ratio']:.3f}  (pairs {m['lowest']:.3f} to {m['highest']:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
