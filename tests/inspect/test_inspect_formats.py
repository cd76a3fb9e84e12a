"""Every format: the same names, shapes and counts as the loader finds, which reads everything."""

from __future__ import annotations

import argparse
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from emscan.errors import LoadError
from emscan.inspect import inspect
from emscan.load import load


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("scale", torch.ones(3))
        self.note = "plain"


def made(network: nn.Module, folder: Path) -> dict[str, str]:
    """Return one file of each format that holds ``network``'s weights, by the name that the report gives the format."""
    weights = network.state_dict()
    paths = {
        name: str(folder / file)
        for name, file in {
            "torch-module": "m.pt", "torch-state-dict": "w.pt", "torch-legacy-state-dict": "l.pt",
            "safetensors": "w.safetensors", "torchscript": "s.pt", "torch-export": "p.pt2", "torch-distributed": "d",
        }.items()
    }  # fmt: skip
    torch.save(network, paths["torch-module"])
    torch.save(weights, paths["torch-state-dict"])
    torch.save(weights, paths["torch-legacy-state-dict"], _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, paths["safetensors"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), paths["torchscript"])
        torch.export.save(torch.export.export(network, (torch.zeros(2, 1, 8, 8),)), paths["torch-export"])
        import torch.distributed.checkpoint as distributed

        distributed.save(weights, checkpoint_id=paths["torch-distributed"], no_dist=True)
    return paths


@pytest.fixture
def paths(network, tmp_path):
    return made(network, tmp_path)


NAMES = (
    "torch-module", "torch-state-dict", "torch-legacy-state-dict", "safetensors", "torchscript", "torch-export",
    "torch-distributed",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [False, True])
def test_it_agrees_with_the_loader(network, paths, name, values):
    found = inspect(paths[name], check_values=values)
    assert found.format == name
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in found.tensors}
    assert tensors == {
        key: (str(value.dtype).removeprefix("torch."), [*value.shape]) for key, value in network.state_dict().items()
    }
    assert found.totals.bytes == sum(value.nbytes for value in network.state_dict().values())
    assert {(tensor.nan, tensor.inf) for tensor in found.tensors} == {(0, 0) if values else (None, None)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load(paths[name], trust=found.audit.needs_trust)
    assert loaded.info.format == found.format
    assert loaded.info.parameters == found.totals.parameters
    assert (loaded.module is None) == ("--model" in found.audit.command)
    if found.audit.needs_trust:
        with pytest.raises(LoadError, match="--trust"):
            load(paths[name])


def test_a_module_says_its_parts(paths):
    found = inspect(paths["torch-module"])
    assert [(module.name, module.class_.rpartition(".")[2]) for module in found.modules] == [
        ("", "Sequential"), ("0", "Conv2d"), ("1", "BatchNorm2d"), ("2", "ReLU"), ("3", "MaxPool2d"), ("4", "Flatten"),
        ("5", "Linear"),
    ]  # fmt: skip
    assert "torch.nn.modules.conv.Conv2d" in found.pickle.imports
    assert found.pickle.refused == []
    assert found.audit.command == f"emscan audit {paths['torch-module']}"


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_a_class_that_is_not_installed(saved, options):
    found = inspect(saved(Custom(), **options))
    assert [(module.name, module.class_) for module in found.modules] == [
        ("", f"{__name__}.Custom"),
        ("inner", "torch.nn.modules.linear.Linear"),
    ]
    assert [tensor.name for tensor in found.tensors] == ["scale", "inner.weight", "inner.bias"]
    assert found.totals.parameters == 9
    (refused,) = found.pickle.refused
    assert refused.name == f"{__name__}.Custom"
    assert refused.reason == "it is not on the safe list, and an object of it would be built"


def test_a_training_checkpoint(saved, network):
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, lr=0.1)
    network(torch.ones(1, 1, 8, 8)).sum().backward()
    optimizer.step()
    path = saved(
        {
            "state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 3,
            "global_step": 12, "pytorch-lightning_version": "2.1.0",
            "hyper_parameters": {"lr": 0.1, "layers": [1, 2]}, "callbacks": {},
        }
    )  # fmt: skip
    found = inspect(path)
    assert found.metadata["epoch"] == 3
    assert found.metadata["global_step"] == 12
    assert found.metadata["lightning"] == "2.1.0"
    assert found.metadata["hyper_parameters"] == {"lr": 0.1, "layers": None}
    assert found.metadata["model_under"] == "state_dict"
    assert "optimizer_states.0.state.0.momentum_buffer" in {tensor.name for tensor in found.tensors}
    assert found.totals.parameters == load(path).info.parameters


@pytest.mark.parametrize(
    "value",
    [
        {"model": nn.Linear(2, 2), "epoch": 1},
        {"ema": {"w": torch.ones(3)}, "model": {"w": torch.ones(2)}},
        {"net": {"w": torch.ones(3)}},
        [torch.ones(2), torch.ones(3)],
        {"history.weight": torch.ones(2), "optim": {"m": torch.ones(9)}},
        {"w": torch.ones(2), "args": argparse.Namespace(lr=1)},
    ],
)
def test_parameters_are_those_that_the_loader_takes(saved, value):
    path = saved(value)
    assert inspect(path).totals.parameters == load(path).info.parameters


def test_shared_tensors_count_once_in_bytes(saved):
    weight = torch.ones(4, 4)
    found = inspect(saved({"a": weight, "b": weight, "c": weight.T}))
    assert found.totals.tensors == 3
    assert found.totals.bytes == 128  # the transposed one is another view


def test_plain_pickles(written):
    found = inspect(written(pickle.dumps(Custom), "c.pkl"))
    assert (found.format, found.pickle.imports, found.audit.needs_trust) == (
        "pickle-state-dict", [f"{__name__}.Custom"], False
    )  # fmt: skip
    found = inspect(written(pickle.dumps(nn.Linear(2, 2)), "m.pkl"))
    assert found.format == "pickle-module"
    assert found.audit.needs_trust
    assert "torch.storage._load_from_bytes" in {one.name for one in found.pickle.refused}
    found = inspect(written(pickle.dumps([1, 2]), "p.pkl"))
    assert found.audit.reason == "it is a pickle that holds no module and no tensors; save a model with torch.save"


def test_numpy_arrays(tmp_path):
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, ">i8"), "c": np.array("x"), "d": np.float64(1)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    np.save(tmp_path / "a.npy", arrays["a"])
    found = inspect(str(tmp_path / "a.npz"))
    assert [(one.name, one.dtype, one.shape, one.bytes) for one in found.tensors] == [
        ("a", "float32", [2, 3], 24), ("b", "int64", [4], 32), ("c", "<U1", [], None), ("d", "float64", [], 8),
    ]  # fmt: skip
    assert not found.audit.supported
    found = inspect(str(tmp_path / "a.npy"), check_values=True)
    assert [(one.name, one.shape, one.nan) for one in found.tensors] == [("", [2, 3], 0)]


def test_numpy_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object))
    assert any("a pickle that can run code" in note for note in inspect(str(tmp_path / "a.npy")).notes)


@pytest.mark.parametrize(
    ("data", "name", "kind", "what"),
    [
        (b"GGUF\x03\0\0\0\x05\0\0\0\0\0\0\0" + bytes(16), "m.gguf", "gguf", "a GGUF model"),
        (b"\x08\x08\x12\x07pytorch", "m.onnx", "onnx", "an ONNX model"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "m.h5", "hdf5", "an HDF5 file (Keras)"),
    ],
)
def test_models_of_other_tools_are_recognized(written, data, name, kind, what):
    found = inspect(written(data, name))
    assert (found.status, found.format, found.title) == ("not supported", kind, what)
    assert not found.audit.supported
    assert found.audit.command is None
    assert found.audit.reason.startswith(f"it is {what}")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is an empty file; copy or save it again"),
        (b"\x89PNG\r\n", "it is a PNG image"),
        (b"hello", "it is plain text"),
        (b"PK\x03\x04broken", "it is a zip archive that is cut short or damaged; copy or save it again"),
        (b"<!doctype html>", "it is an HTML page; a download may have failed: fetch the file again"),
        (b"\x00\x01\x02\x03", "it is of no format that emscan knows"),
    ],
)
def test_what_is_no_model_is_one_line(written, data, reason):
    path = written(data)
    with pytest.raises(LoadError) as caught:
        inspect(path)
    assert str(caught.value).startswith(f"cannot inspect {path}: {reason}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LoadError, match="there is no such file; check the path"):
        inspect(str(tmp_path / "none.pt"))
