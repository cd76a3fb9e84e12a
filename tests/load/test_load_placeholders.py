"""Tensors from pickles that name what is not on the safe list: nothing is imported, and only where nothing else is wrong."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from emscan.errors import LoadError
from emscan.load import load
from emscan.load.format_checkpoint import NAMED

ARCHITECTURE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.act = torch.relu

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.LSTM(3, 2)
        self.tied = self.blocks[0].inner
"""


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """A class for a pickle to name whose module is gone when the pickle is read; and the file with its source."""
    file = tmp_path / "net.py"
    file.write_text(ARCHITECTURE)
    module = types.ModuleType("gone_away")
    exec(ARCHITECTURE, vars(module))
    monkeypatch.setitem(sys.modules, "gone_away", module)
    for name in ("Net", "Block"):
        getattr(module, name).__module__ = "gone_away"

    def leave() -> str:
        monkeypatch.delitem(sys.modules, "gone_away")
        return f"{file}:Net"

    return module.Net(), leave


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_module_of_a_class_that_is_not_here(absent, saved, legacy, nested):
    net, leave = absent
    value = {"model": net, "optimizer": torch.optim.SGD(net.parameters()), "epoch": 1} if nested else net
    path = saved(value, _use_new_zipfile_serialization=not legacy)
    expected = net.state_dict()
    target = leave()
    with pytest.raises(LoadError) as caught:
        load(path)
    assert "unpickling it would import gone_away.Net, gone_away.Block, " in caught.value.message
    assert caught.value.hint == NAMED
    loaded = load(path, model_target=target)
    assert list(loaded.module.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.notes[0].startswith("only the tensors were taken from it, without importing gone_away.Net")
    assert not loaded.info.trusted
    assert "gone_away" not in sys.modules


def test_records_beside_the_tensors_are_left_out(saved):
    loaded = load(
        saved(
            {
                "state_dict": {"w": torch.arange(3.0)},
                "hyper_parameters": argparse.Namespace(rate=0.1, place=pathlib.PurePosixPath("x")),
                "best": np.float64(0.5),
                "curve": np.arange(3.0),
                "when": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
                "counts": collections.defaultdict(int, a=1),
            }
        )
    )
    assert loaded.weights["w"].tolist() == [0, 1, 2]
    assert loaded.notes[0].startswith("records that are no tensors were left out, without importing argparse.Namespace")


def test_views_and_ties_survive(saved):
    base = torch.arange(12.0)
    value = {
        "a": base.view(3, 4).t(),
        "b": base[2:5],
        "half": torch.ones(2).half(),
        "none": torch.empty(0, 2),
        "n": np.float32(1),
    }
    loaded = load(saved(value)).weights
    for name in ("a", "b", "half", "none"):
        assert loaded[name].dtype == value[name].dtype
        assert loaded[name].tolist() == value[name].tolist()
    assert loaded["a"].untyped_storage().data_ptr() == loaded["b"].untyped_storage().data_ptr()


class Custom(nn.Module):
    pass


class Reduced:
    def __init__(self, function: object, *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    ("function", "name"),
    [(exec, "builtins.exec"), (functools.reduce, "functools.reduce"), (torch.load, "torch.serialization.load")],
)
@pytest.mark.parametrize("target", [None, "torch.nn:Identity"])
def test_a_call_of_a_function_is_refused_with_or_without_an_architecture(saved, function, name, target):
    path = saved({"state_dict": {"w": torch.ones(2)}, "record": np.float64(1), "x": Reduced(function, "1")})
    with pytest.raises(LoadError, match=f"would import .*{name}"):
        load(path, model_target=target)


def test_a_module_among_records_is_not_taken_apart_by_itself(saved):
    with pytest.raises(LoadError, match="numpy") as caught:
        load(saved({"model": nn.Linear(2, 2), "best": np.float64(1)}))
    assert caught.value.hint == NAMED


def test_what_is_malformed_stays_refused(packed):
    body = b"\x80\x02}(X\x01\x00\x00\x00acnumpy\ndtype\nX\x01\x00\x00\x00bctorch.nn.modules.linear\nLinear\nK\x03K\x03\x86Ru."
    with pytest.raises(LoadError, match=r"unpickling it would import numpy\.dtype"):
        load(packed(body), model_target="torch.nn:Identity")
