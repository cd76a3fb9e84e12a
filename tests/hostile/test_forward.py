"""Modules that load, and whose forward would take memory or time without end, or end the process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.hostile.helpers import DAMAGED, command, refusal, refused


def changed(layer: nn.Module, **attributes: object) -> nn.Module:
    """Return a layer with attributes that its constructor would not give it."""
    vars(layer).update(attributes)
    return layer


HUGE = 10**6
LARGE = {
    "constant-pad": lambda: nn.Sequential(nn.Linear(4, 4), nn.ConstantPad2d(HUGE, 0.0)),
    "zero-pad": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ZeroPad2d(HUGE)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), changed(nn.Conv2d(1, 1, 3), padding=(16_000, 16_000))),
    "transposed-convolution": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ConvTranspose2d(1, 1, 3, stride=16_000)),
    "upsample": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Upsample(scale_factor=float(HUGE))),
    "upsample-size": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Upsample(size=(HUGE, HUGE))),
    "adaptive-pool": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d((HUGE, HUGE))),
    "adaptive-max-pool": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveMaxPool2d((HUGE, HUGE))),
    "fold": lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.Fold((HUGE, HUGE), 2, stride=HUGE)),
    "expand": lambda: nn.Sequential(nn.Linear(4, 4), *[nn.Upsample(scale_factor=1000.0) for _ in range(4)]),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_layer_may_allocate_what_it_likes(saved, name):
    text = refused(saved(LARGE[name]()), "--max-memory", "256M")
    assert text.startswith(("no input shape could be derived for Sequential", "one batch of ")), text


def test_the_message_names_the_operator_and_the_size(saved):
    text = refused(saved(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ConstantPad2d(HUGE, 0.0))), "--max-memory", "256M")
    assert "aten.pad would take " in text
    assert "MiB, 256 MiB are allowed" in text


@pytest.mark.parametrize("name", ["constant-pad", "upsample-size", "adaptive-pool"])
def test_memory_does_not_grow(saved, name, grows):
    """The default limit, half of what is free, holds as well."""
    assert grows("audit", saved(LARGE[name]())) < 300


def test_the_shape_only_pass_refuses_a_probe_that_is_too_large(saved, tmp_path):
    torch.save(torch.ones(64, 1, 64, 64), tmp_path / "probe.pt")
    path = saved(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConstantPad2d(3000, 0.0)))
    text = refused(path, "--probe", str(tmp_path / "probe.pt"), "--max-memory", "1G")
    assert text.startswith("one batch of 64 samples needs about ")
    assert text.endswith("use a smaller --batch-size or a larger --max-memory")


@pytest.mark.parametrize(
    "change",
    [
        {"in_features": 10**12}, {"in_features": -1}, {"in_features": "x"}, {"in_features": None}, {"in_features": (2, 2)},
        {"in_features": 1j}, {"out_features": 2**63},
    ],
)  # fmt: skip
def test_numbers_that_the_weights_contradict_do_no_harm(saved, change):
    """What a layer says of its sizes is not used where its weights tell."""
    status, out, _ = command("audit", saved(changed(nn.Linear(4, 3), **change)))
    assert status in (0, 3)
    assert "15 parameters" in out


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 4), nn.GroupNorm(2, 4)])
def test_missing_attributes_are_an_error_of_the_model(saved, layer):
    for name in [name for name in vars(layer) if not name.startswith("_") and name != "training"]:
        broken = type(layer).__new__(type(layer))
        vars(broken).update({key: value for key, value in vars(layer).items() if key != name})
        status, out, err = command("audit", saved(broken))
        assert status in (0, 2, 3)
        assert not any("internal error" in line or "Traceback" in line for line in err)
        assert (status == 2) != bool(out)


def test_layers_that_would_be_run_for_hours(saved):
    layer: nn.Module = nn.Linear(4, 4)
    for _ in range(14):
        layer = nn.Sequential(layer, layer)
    assert refusal(saved(layer)).startswith("one pass would visit its layers more than 20,000 times")


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (nn.ConvTranspose2d(1, 1, 3), {"stride": (32_768, 32_768)}),
        (nn.ConvTranspose1d(1, 1, 3), {"stride": (32_767,)}),
        (nn.Conv2d(1, 1, 3), {"padding": (2**31, 2**31)}),
        (nn.Conv2d(1, 1, 3), {"dilation": (-(2**20), 1)}),
        (nn.MaxPool1d(2), {"kernel_size": 2**40}),
        (nn.Fold(4, 2), {"padding": 2**31}),
    ],
)
def test_numbers_that_end_the_process_or_never_end(saved, layer, change):
    (name, value), kind = next(iter(change.items())), type(layer).__name__
    assert refusal(saved(changed(layer, **change))) == f"its {kind} has a {name} of {value}; {DAMAGED}"
