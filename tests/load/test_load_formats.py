from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from emscan.errors import LoadError, UsageError
from emscan.load import load
from emscan.load.registry import Format, formats


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x):
        return self.inner(x)


def layers() -> list[tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 8)
    return [
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), (x,)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 2), (x,)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=F.silu), (x,)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.GELU("tanh")), (x,)),
        (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (x, x)),
        (nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x)),
        (nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True), (x,)),
        (nn.LSTM(8, 4, bias=False), (x,)),
        (nn.GRU(8, 4), (x,)),
        (nn.RNNCell(8, 4), (x[0],)),
        (nn.Embedding(10, 4, padding_idx=0), (torch.tensor([1, 0, 3]),)),
        (nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Unflatten(1, (5, 1))), (x,)),
        (nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool1d(2), nn.GroupNorm(1, 5), nn.PReLU()), (x,)),
    ]


def first(value):
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", range(len(layers())), ids=lambda case: type(layers()[case][0]).__name__ + str(case))
def test_pickled_layers_compute_the_same(case, saved):
    module, inputs = layers()[case]
    module.eval()
    loaded = load(saved(module))
    assert type(loaded.module) is type(module)
    torch.testing.assert_close(first(loaded.module(*inputs)), first(module(*inputs)), rtol=0, atol=0)
    assert loaded.info.parameters == sum(p.numel() for p in module.parameters())


def test_pickled_module_keeps_modes_names_and_provenance(saved, network):
    network[1].train()
    path = saved(network)
    loaded = load(path)
    assert [m.training for m in loaded.module.modules()] == [m.training for m in network.modules()]
    assert list(loaded.module.state_dict()) == list(network.state_dict())
    assert loaded.weights is None
    assert loaded.notes == []
    assert loaded.info.path == path
    assert loaded.info.format == "torch-module"
    assert loaded.info.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert not loaded.info.trusted


def test_shared_parameters_stay_shared_and_are_counted_once(saved):
    layer = nn.Linear(3, 3)
    loaded = load(saved(nn.Sequential(layer, nn.ReLU(), layer)))
    assert loaded.module[0] is loaded.module[2]
    assert loaded.info.parameters == 12


def test_module_inside_a_checkpoint_and_a_parallel_wrapper(saved, network):
    loaded = load(saved({"model": nn.DataParallel(network), "epoch": 3}))
    assert type(loaded.module) is nn.Sequential
    assert loaded.notes == ["the model was found under 'model'", "unwrapped from DataParallel"]


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_has_the_same_values(saved, network, legacy):
    loaded = load(saved(network.state_dict(), _use_new_zipfile_serialization=not legacy))
    assert loaded.module is None
    assert loaded.info.format == ("torch-legacy-state-dict" if legacy else "torch-state-dict")
    expected = network.state_dict()
    assert list(loaded.weights) == list(expected)
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)
    assert loaded.info.parameters == sum(t.numel() for t in expected.values())


def test_safetensors_has_the_same_values_in_natural_order(tmp_path):
    expected = {f"{i}.weight": torch.randn(2, i + 1) for i in range(12)}
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(expected, path)
    loaded = load(str(path))
    assert list(loaded.weights) == list(expected)
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)
    assert loaded.info.format == "safetensors"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
def test_content_decides_the_format_not_the_name(tmp_path, name):
    path = tmp_path / name
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    assert load(str(path)).info.format == "safetensors"


def test_safetensors_header_that_looks_like_a_pickle(written):
    for size in (0x0180, 0x0280, 0x0480):
        header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(size)
        path = written(size.to_bytes(8, "little") + header + b"\7", "w.safetensors")
        assert load(path).weights["w"].tolist() == [7]


def test_unusual_tensors(saved):
    value = {
        "float8": torch.zeros(3).to(torch.float8_e4m3fn),
        "bfloat": torch.ones(2, 3).bfloat16().mT,
        "bool": torch.tensor([True]),
        "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.ones(2)),
        "buffer": nn.Buffer(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "view": torch.arange(10.0)[2:8:3],
        "expanded": torch.ones(1).expand(4, 5),
    }
    loaded = load(saved(value)).weights
    for name, tensor in value.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].tolist() == tensor.tolist()
        assert not loaded[name].requires_grad


@pytest.fixture
def torchscript(tmp_path, network):
    path = str(tmp_path / "script.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), path)
    return path


@pytest.fixture
def exported(tmp_path, network):
    path = str(tmp_path / "program.pt2")
    torch.export.save(torch.export.export(network, (torch.zeros(2, 1, 8, 8),)), path)
    return path


def test_torchscript_needs_trust(torchscript, network, capfd):
    with pytest.raises(LoadError) as caught:
        load(torchscript)
    assert str(caught.value) == (
        f"cannot load {torchscript}: it is a TorchScript archive, which holds a program; "
        "if you trust where it comes from, pass --trust"
    )
    loaded = load(torchscript, trust=True)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(loaded.module(x), network(x))
    assert loaded.info.trusted
    assert loaded.info.format == "torchscript"
    assert capfd.readouterr() == ("", "")


def test_export_needs_trust_and_keeps_names(exported, network, capfd):
    with pytest.raises(LoadError, match=r"it is a torch\.export archive, which holds a program; .* pass --trust"):
        load(exported)
    loaded = load(exported, trust=True)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded.module(x), network(x))
    assert [n for n, _ in loaded.module.named_parameters()] == [n for n, _ in network.named_parameters()]
    assert loaded.info.trusted
    assert loaded.info.format == "torch-export"
    assert capfd.readouterr() == ("", "")


def test_trust_is_recorded_only_where_it_was_needed(saved, network):
    assert not load(saved(network), trust=True).info.trusted
    loaded = load(saved(Custom()), trust=True)
    assert isinstance(loaded.module, Custom)
    assert loaded.info.trusted
    assert loaded.notes == [
        f"loaded with --trust although unpickling it would import {__name__}.Custom, which is not on the safe list"
    ]


def test_plain_pickle_needs_trust(written):
    path = written(pickle.dumps(Custom()), "model.pkl")
    with pytest.raises(
        LoadError, match=r"it is a pickle that torch\.save did not write, and unpickling it would import"
    ):
        load(path)
    loaded = load(path, trust=True)
    assert isinstance(loaded.module, Custom)
    assert loaded.info.format == "pickle-module"


def test_trusted_file_whose_code_is_missing(packed):
    path = packed(b"\x80\x02cno_such_package.models\nNet\n)\x81.")
    with pytest.raises(LoadError, match=r"it needs code that is not here \(ModuleNotFoundError: No module named 'no_"):
        load(path, trust=True)


def test_device(saved, network):
    with pytest.raises(UsageError, match="--device nowhere does not exist here; try --device cpu"):
        load(saved(network), device="nowhere")
    assert load(saved(network.state_dict()), device="meta").weights["0.weight"].is_meta


def test_every_format_is_one_registered_file():
    kinds = formats()
    assert len({kind.name for kind in kinds}) == len(kinds) == len({type(kind).__module__ for kind in kinds})
    files = {path.stem for path in (Path(load.__code__.co_filename).parent).glob("format_*.py")}
    assert {type(kind).__module__.rpartition(".")[2] for kind in kinds} == files
    assert all(isinstance(kind, Format) for kind in kinds)


def test_formats_exclude_each_other(saved, tmp_path, network, torchscript, exported, written):
    from emscan.load.source import Source

    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    paths = [
        saved(network, "a.pt"),
        saved(network.state_dict(), "b.pt", _use_new_zipfile_serialization=False),
        str(tmp_path / "w.safetensors"),
        torchscript,
        exported,
        written(pickle.dumps([1]), "c.pkl"),
        written(pickle.dumps([1], 0), "d.pkl"),
    ]
    for path in paths:
        assert sum(kind.matches(Source.read(path)) for kind in formats()) == 1
