"""Masks of dead units: they leave the outputs as they are, and torch can use them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from emscan import audit, pruning
from emscan.errors import LoadError
from emscan.probe import from_python
from tests.cli.inprocess import Emscan, emscan

__all__ = ["emscan"]

FIXTURES = Path(__file__).parent.parent / "fixtures"


def masks(model: nn.Module, x: Tensor) -> pruning.Masks:
    report = audit(model, x)
    return pruning.masks(model, report, from_python(x, None, model))


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU6(), nn.Linear(6, 2)
    ).eval()
    with torch.no_grad():
        model[1].bias[1] = -100.0  # the normalization shuts it, whatever the convolution gives
        model[0].weight[2], model[1].weight[2], model[1].bias[2] = 0.0, 100.0, -0.5
        model[1].running_mean[2], model[0].bias[2] = 1.0, 0.9  # only as it is: with a bias of 0 it would stay shut, too
        model[4].bias[0], model[4].bias[3] = -100.0, 100.0  # off, and always at 6
    return model


def test_masks_leave_outputs_and_model_as_they_were() -> None:
    model, x = convolutions(), images()
    before, state = model(x).detach(), copy.deepcopy(model.state_dict())
    found = masks(model, x)
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert 1 in found.units["0"]
    assert 0 in found.units["4"]
    assert 3 not in found.units["4"]
    assert found.left["4"] == "1 of its units are stuck at a constant other than 0"
    for name, mask in found.masks.items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), parameter, mask)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert not model[0].weight[1].any()


def test_a_normalization_that_would_wake_a_unit_is_masked_with_it() -> None:
    model, x = convolutions(), images()
    with torch.no_grad():  # shut by what the convolution gives: without it, the normalization's bias would open it
        model[0].weight[0] = 0.0
        model[0].bias[0], model[1].bias[0] = -100.0, 1.0
    before = model(x).detach()
    found = masks(model, x)
    assert 0 in found.units["0"]
    assert {"1.weight", "1.bias"} <= found.masks.keys()
    for name, mask in found.masks.items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), parameter, mask)
    assert torch.allclose(model(x), before, atol=1e-6)


def test_a_gate_that_is_not_0_at_0_is_left_out() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)), torch.randn(16, 4)
    with torch.no_grad():
        model[0].bias[2] = -100.0
    found = masks(model, x)
    assert not found.masks
    assert found.left == {"0": "without them the outputs are others"}


def test_a_file_from_the_command_line(emscan: Emscan, tmp_path: Path) -> None:
    path, probe = tmp_path / "dead.safetensors", FIXTURES / "digits.safetensors"
    ran = emscan("audit", FIXTURES / "relu_mlp.pt", "--probe", probe, "--prune-file", path)
    assert ran.status == 0
    assert "emscan: wrote masks of 33 units in 3 layers" in ran.err
    from emscan.load import load

    model = load(str(FIXTURES / "relu_mlp.pt")).module
    assert model is not None
    x = load_file(probe)["images"]
    before = model(x)
    assert sorted(pruning.apply(model, path)) == ["0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight"]
    assert torch.allclose(model(x), before, atol=1e-5)
    assert int((model.get_submodule("0").weight_mask.amax(1) == 0).sum()) == 16


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(4, 5)), tmp_path / "masks.safetensors"
    for masks_, message in (
        ({"0.weight": torch.ones(5, 4), "9.weight": torch.ones(5, 4)}, "the model has no parameter 9.weight"),
        (
            {"0.weight": torch.ones(5, 4), "0.bias": torch.ones(4)},
            r"the mask of 0.bias is \(4,\), the parameter is \(5,\)",
        ),
    ):
        save_file(masks_, path)
        with pytest.raises(LoadError, match=message):
            pruning.apply(model, path)
        assert not prune.is_pruned(model)
    path.write_bytes(b"nothing")
    with pytest.raises(LoadError, match="cannot load"):
        pruning.apply(model, path)
