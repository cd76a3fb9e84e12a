"""What a peer costs that does something comparable, as a ratio to a plain forward: `python benchmarks/peers.py`.

Peers that are not installed are left out (`pip install --no-deps torchdiag moewatch model-clinic`, and transformers).
Each is given the network that it can read: modules for activations, a transformers router, attention with its weights
handed out; emscan audits the same network on the same batches. Runs are interleaved, the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from overhead import Convolutional
from torch import Tensor, nn

import emscan

Run = Callable[[], object]


@dataclass
class Contest:
    """One network, its batches, and who looks at it."""

    title: str
    plain: Run
    audit: Run
    peers: dict[str, Run]


class Modules(Convolutional):
    """The convolutional network with its activations as modules, which hooks can see."""

    def __init__(self) -> None:
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in self.convolutions)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for index, parts in enumerate(zip(self.convolutions, self.norms, self.relus, strict=True)):
            convolution, norm, relu = parts
            x = relu(norm(convolution(x)))
            if index in (1, 3):
                x = nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def forward(model: nn.Module, batches: list[Any]) -> Run:
    """Return a plain run over all batches."""

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)

    return run


def activations() -> Contest:
    """Dead units of a CNN: torchdiag looks at one batch at a time and keeps every activation."""
    torch.manual_seed(0)
    model = Modules().eval()
    batches = list(torch.randn(256, 3, 32, 32).split(64))
    peers: dict[str, Run] = {}
    with contextlib.suppress(ImportError):
        import torchdiag

        peers["torchdiag"] = lambda: [torchdiag.check_dead_neurons(model, batch) for batch in batches]
    return Contest("dead units, CNN", forward(model, batches), lambda: emscan.audit(model, batches), peers)


def router() -> Contest:
    """Load of a Mixtral's experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 1000, (8, 128)), "use_cache": False} for _ in range(12)]
    peers: dict[str, Run] = {}
    with contextlib.suppress(ImportError):
        import moewatch

        peers["moewatch"] = lambda: moewatch.audit(model, batches, steps=len(batches), verbose=False)
    return Contest("experts, Mixtral", forward(model, batches), lambda: emscan.audit(model, batches), peers)


def attention(tokens: int) -> Contest:
    """Entropies of a Llama's heads: model-clinic has the weights handed out, which needs eager attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=384, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=6,
        max_position_embeddings=tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    eager = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    batches = [{"input_ids": torch.randint(0, 1000, (1, tokens)), "use_cache": False} for _ in range(8)]
    peers: dict[str, Run] = {}
    with contextlib.suppress(ImportError):
        from model_clinic._tools.attention import capture_attention

        peers["model-clinic"] = lambda: [
            capture_attention(eager, Tokens(batch["input_ids"]), "", "cpu") for batch in batches
        ]
    audit = lambda: emscan.audit(model, batches)  # noqa: E731
    return Contest(f"heads, Llama, {tokens:,} tokens", forward(model, batches), audit, peers)


@dataclass
class Tokens:
    """Stands where a tokenizer is asked for: the ids are there already."""

    ids: Tensor

    def apply_chat_template(self, *_: object, **__: object) -> str:
        return ""

    def __call__(self, *_: object, **__: object) -> dict[str, Tensor]:
        return {"input_ids": self.ids}

    def decode(self, token: object) -> str:
        return str(token)


def measured(contest: Contest, repeats: int) -> dict[str, float]:
    """Return the median seconds of every run, interleaved; what peers print is swallowed."""
    runs = {"plain": contest.plain, "emscan": contest.audit, **contest.peers}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print one line per contest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    makers: list[Callable[[], Contest]] = [activations, router, lambda: attention(512), lambda: attention(2048)]
    for make in makers:
        contest = make()
        found = measured(contest, options.repeats)
        ratios = [f"{name} {value / found['plain']:.2f}" for name, value in found.items() if name != "plain"]
        print(f"{contest.title}: plain {found['plain']:.3f} s; times that: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
