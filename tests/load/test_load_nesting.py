"""Where weights lie in a training checkpoint, and whose names they have."""

from __future__ import annotations

import pytest
import torch
import torch.serialization
from torch import nn

from emscan.errors import LoadError
from emscan.load import load

W = torch.ones(2)


@pytest.mark.parametrize(
    "value",
    [
        {"state_dict": {"w": W}},
        {
            "model_state_dict": {"w": W},
            "optimizer_state_dict": {"state": {0: {"m": W}}, "param_groups": []},
            "loss": W[0],
        },
        {"params": {"w": W}, "params_ema": {"w": W}},
        {"generator": {"w": W}, "step": 3},
        {"checkpoint": 1, "state": {"x": 1}, "model": {"net": {"w": W}}},
        {"model_ema": {"w": W}, "epoch": 1},
        {"net": {"module.w": W}},
        {"state_dict": {"_orig_mod.module.w": W}, "rng_state": [W], "lr_schedulers": [{"a": W}]},
        {"model": {"w": W}, "anything": {"state": {0: {"m": W}}, "param_groups": [{"lr": 1.0}]}},
    ],
    ids=lambda value: "+".join(value),
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_weights_are_found(saved, value, legacy):
    loaded = load(saved(value, _use_new_zipfile_serialization=not legacy))
    assert list(loaded.weights) == ["w"]
    assert loaded.weights["w"].tolist() == [1, 1]


def test_raw_weights_come_before_averages_and_it_is_said(saved):
    loaded = load(saved({"ema": {"w": W}, "model": {"w": W + 1}}))
    assert loaded.weights["w"].tolist() == [2, 2]
    assert loaded.notes == ["the model was found under 'model'", "other weights beside it were left out: ema"]
    only = load(saved({"ema_state_dict": {"w": W}, "epoch": 2}))
    assert only.notes[0].endswith("a moving average of the weights; the raw weights are not in the file")


def test_a_list_of_layers_has_places_for_names(saved, tmp_path):
    layers = [nn.Conv1d(2, 3, 1), nn.Linear(3, 4)]
    value = [("conv", (layer.state_dict(), {"kernel": 1})) for layer in layers]
    path = saved(value, _use_new_zipfile_serialization=False)
    assert list(load(path).weights) == ["0.1.0.weight", "0.1.0.bias", "1.1.0.weight", "1.1.0.bias"]
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width=4):\n"
        "        super().__init__()\n"
        "        self.conv, self.head = nn.Conv1d(2, 3, 1), nn.Linear(3, width)\n"
    )
    loaded = load(path, model_target=f"{tmp_path}/net.py:Net")
    assert torch.equal(loaded.module.head.weight, layers[1].weight)
    assert "matched in order, shape by shape" in loaded.notes[-1]
    with pytest.raises(LoadError, match="do not fit"):
        load(path, model_target=f"{tmp_path}/net.py:Net", model_arguments={"width": 5})


def test_a_list_of_modules_is_taken_apart_and_one_module_is_the_model(saved):
    loaded = load(saved([nn.Linear(2, 2), nn.Linear(2, 3)]))
    assert list(loaded.weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert loaded.notes == ["its modules 0, 1 were taken apart: how they connect is not in the file"]
    assert type(load(saved([nn.Linear(2, 2)])).module) is nn.Linear


@pytest.mark.parametrize("tag", ["cuda", "cuda:7", "mps", "xla:0", "hpu", "xpu:1", "meta"])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_another_device(saved, monkeypatch, tag, legacy):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: tag)
    path = saved({"w": torch.arange(4.0)}, _use_new_zipfile_serialization=not legacy)
    weight = load(path).weights["w"]
    assert weight.device.type == "cpu"
    assert weight.tolist() == [0, 1, 2, 3]


def test_packed_weights_are_said(saved):
    layer = {"q.qweight": torch.ones(2, 2, dtype=torch.int32), "q.qzeros": torch.ones(1, 1), "q.scales": torch.ones(1)}
    assert "GPTQ or AWQ" in load(saved(layer)).notes[0]
    assert load(saved({"a.scales": W, "a.weight": W})).notes == []


def test_types_that_the_older_format_cannot_restore(saved):
    path = saved({"w": torch.zeros(2).to(torch.float8_e5m2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(LoadError, match="torch cannot read from its older format; save it in torch's present format"):
        load(path)
