"""Pickled modules with parts that would run, never end, or crash a kernel."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from emscan.load import graph
from emscan.load.source import RefusalError, UnsafeError
from tests.hostile.helpers import Call, refusal


def planted(module: nn.Module, **attributes: object) -> nn.Module:
    vars(module).update(attributes)
    return module


def hooked(register: str) -> nn.Module:
    module = nn.Linear(2, 2)
    getattr(module, register)(F.relu)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hooked("register_forward_hook"), "its Linear carries hooks (_forward_hooks), which would run as code"),
        (lambda: hooked("register_forward_pre_hook"), "its Linear carries hooks (_forward_pre_hooks)"),
        (lambda: hooked("register_full_backward_hook"), "its Linear carries hooks (_backward_hooks)"),
        (lambda: hooked("register_state_dict_pre_hook"), "its Linear carries hooks (_state_dict_pre_hooks)"),
        (lambda: planted(nn.Linear(2, 2), forward=F.relu), "its Linear replaces forward of its class"),
        (lambda: planted(nn.Linear(2, 2), half=F.relu), "its Linear replaces half of its class"),
        (lambda: planted(nn.Linear(2, 2), __setstate__=F.relu), "its Linear replaces __setstate__ of its class"),
        (lambda: planted(nn.Linear(2, 2), kind=nn.Linear), "it holds Linear, which is no layer, tensor or plain value"),
        (lambda: planted(nn.Linear(2, 2), inner=nn.ReLU()), "its Linear holds a layer outside its list of layers"),
        (lambda: planted(nn.Linear(2, 2), inner=[[nn.ReLU()]]), "its Linear holds a layer outside its list of layers"),
        (lambda: planted(nn.Linear(2, 2), _modules={"a.b": nn.ReLU()}), "its Linear has a malformed entry in _modules"),
        (lambda: planted(nn.Linear(2, 2), _modules={"a": 3}), "its Linear has a malformed entry in _modules"),
        (lambda: planted(nn.Linear(2, 2), _parameters=None), "its Linear lacks what every layer has"),
        (lambda: planted(nn.Linear(2, 2), training=1), "its Linear lacks what every layer has"),
        (lambda: {"w": torch.ones(2), "f": nn.Linear}, "it holds Linear, which is no layer"),
        (lambda: prune.identity(nn.Linear(2, 2), "weight"), "unpickling it would import torch.nn.utils"),
        (lambda: nn.LazyLinear(2), "unpickling it would import torch.nn.modules.linear.LazyLinear"),
        (lambda: {"w": torch.ones(2).to_sparse()}, "unpickling it would import torch._utils._rebuild_sparse_tensor"),
        (lambda: {"s": torch.ones(2).untyped_storage()}, "it holds torch.storage.TypedStorage"),
    ],
)
def test_objects_are_refused(saved, make, reason):
    assert refusal(saved(make())).startswith(reason)


def test_layers_that_never_end(saved):
    loop = nn.Sequential(nn.Linear(2, 2))
    loop._modules["again"] = nn.Sequential()
    loop._modules["again"]._modules["back"] = loop
    assert refusal(saved(loop)).startswith("one of its layers contains itself")

    layer: nn.Module = nn.Identity()
    for _ in range(40):
        layer = nn.Sequential(layer, layer)
    assert refusal(saved(layer)).startswith("one pass would visit its layers more than 20,000 times")

    for _ in range(200):
        layer = nn.Sequential(layer)
    with pytest.raises(UnsafeError, match="its layers are nested more than 200 deep"):
        graph.check_graph(layer)


def test_the_second_fence_alone(canary):
    """What the first fence would have to miss."""
    ordered = OrderedDict(w=torch.ones(1))
    ordered.values = F.relu
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(F.relu)
    for value in (ordered, tensor, [os.system], functools.partial(os.system), Path(), nn.Linear, Call(os.system)):
        with pytest.raises(UnsafeError):
            graph.check_graph(value)


@pytest.mark.parametrize("change", [{"num_heads": 0}, {"num_heads": -2}, {"num_heads": 3}, {"head_dim": "4"}])
def test_attention_whose_numbers_lie(saved, change):
    """torch's fused kernel would divide by zero and end the process."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    vars(layer.self_attn).update(change)
    assert refusal(saved(layer)).startswith("its MultiheadAttention has heads that do not match its width")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 10**12}, "has weights that do not match its sizes"),
        ({"num_layers": 1}, "has weights that do not match its sizes"),
        ({"hidden_size": 400}, "has weights that do not match its sizes"),
        ({"input_size": 1}, "has weights that do not match its sizes"),
        ({"bidirectional": True}, "has weights that do not match its sizes"),
        ({"bias": False}, "has weights that do not match its sizes"),
        ({"mode": "LSTM_CELL"}, "lacks what the layer has"),
        ({"num_layers": "2"}, "lacks what the layer has"),
        ({"_flat_weights": []}, "lacks what the layer has"),
        ({"_flat_weights_names": None}, "lacks what the layer has"),
    ],
)
def test_recurrent_layers_whose_numbers_lie(kind, change, reason):
    """torch's kernels would read beyond the weights and crash."""
    state = {**vars(kind(3, 4, 2)), "_flat_weight_refs": [], **change}
    layer = kind.__new__(kind)
    vars(layer).update(state)
    with pytest.raises(RefusalError, match=f"its {kind.__name__} {reason}"):
        graph.check_graph(layer)
    graph.check_graph(kind(3, 4, 2, bias=False, bidirectional=True))
