"""A short training run that kills units, its checkpoints, and what a float64 pass with hooks says of them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent.parent
PROBE = str(ROOT / "fixtures" / "digits.safetensors")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10), nn.Softmax(-1))


def train(folder: Path, *, saves: int = 7, every: int = 4, rate: float = 2.0) -> list[Path]:
    """Train with far too high a learning rate, as Lightning would name the files; the names do not sort by step."""
    data = load_file(PROBE)
    images, targets = data["images"], data["targets"]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for step in range(saves * every + 1):
        if step % every == 0:
            paths.append(folder / f"epoch={step // 10}-step={step}.ckpt")
            torch.save(model, paths[-1])
        pick = torch.arange(step * 64, step * 64 + 64) % len(images)
        loss = F.nll_loss(torch.log(model(images[pick]) + 1e-6), targets[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return paths


def revive(path: Path, out: Path, unit: int, layer: int = 0) -> None:
    """Save the model with the bias of one unit raised, so that it is on somewhere."""
    model = torch.load(path, weights_only=False)
    with torch.no_grad():
        model[layer].bias[unit] = 50.0
    torch.save(model, out)


def oracle(path: Path) -> dict[str, dict]:
    """Return, by layer, what an independent float64 pass over the whole probe says."""
    model = torch.load(path, weights_only=False).double()
    kept: dict[str, torch.Tensor] = {}
    for name, child in model.named_children():
        child.register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out.detach()))
    model(load_file(PROBE)["images"].double())
    found: dict[str, dict] = {}
    for owner, gate in (("0", "1"), ("2", "3")):
        found[owner] = {"dead": [i for i, on in enumerate((kept[gate] > 0).any(0).tolist()) if not on]}
    r = kept["5"]
    entropy = -(r * torch.log(r.clamp_min(1e-300))).sum(-1)
    load = r.mean(0)
    of_load = float(-(load * torch.log(load.clamp_min(1e-300))).sum())
    found["4"] = {
        "dead": [],
        "load": load.tolist(),
        "starved": [i for i, share in enumerate(load.tolist()) if share < 0.01 / 10],
        "normalized_entropy": float(entropy.mean()) / math.log(10),
        "effective_components": math.exp(of_load),
        "information": of_load - float(entropy.mean()),
    }
    return found
