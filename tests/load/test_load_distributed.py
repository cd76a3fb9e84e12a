"""Folders of torch.distributed.checkpoint: put together by torch's reader, after checks, and never unpickled."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from emscan.errors import LoadError
from emscan.load import load


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    state = {
        "model": {"0.weight": torch.randn(4, 3), "0.bias": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)},
        "optim": {"state": {"0": {"m": torch.zeros(4, 3)}}, "lr": 0.1},
        "step": 7,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(copy.deepcopy(state), checkpoint_id=tmp_path / "ckpt", no_dist=True)
    return tmp_path / "ckpt"


def refusal(path: Path) -> str:
    with pytest.raises(LoadError) as caught:
        load(str(path))
    prefix = f"cannot load {path}: "
    assert caught.value.message.startswith(prefix)
    return str(caught.value).removeprefix(prefix)


def changed(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_the_tensors_of_the_model(folder):
    loaded = load(str(folder))
    torch.manual_seed(0)
    assert torch.equal(loaded.weights["0.weight"], torch.randn(4, 3))
    assert loaded.weights["0.bias"].dtype == torch.bfloat16
    assert loaded.weights["n"].item() == 3
    assert loaded.info.format == "torch-distributed"
    assert not loaded.info.trusted
    assert loaded.notes == [
        "records of the training were left out: optim.lr, step, optim.state.0.m",
        "the model was found under 'model'",
    ]


def test_a_folder_of_accelerate_has_it_one_deeper(folder):
    (folder.parent / "outer").mkdir()
    folder.rename(folder.parent / "outer" / "pytorch_model_fsdp_0")
    assert list(load(str(folder.parent / "outer")).weights) == ["0.weight", "0.bias", "n"]


class Attack:
    def __reduce__(self):
        return print, ("attacked",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_that_names_anything_else(folder, capsys, protocol):
    (folder / ".metadata").write_bytes(pickle.dumps({"x": Attack()}, protocol))
    assert refusal(folder).startswith("reading its .metadata would import builtins.print")
    assert capsys.readouterr().out == ""


def test_records_are_never_unpickled(folder, capsys):
    data = next(folder.glob("*.distcp"))
    step = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    info = next(info for index, info in step.items() if index.fqn == "step")
    content = bytearray(data.read_bytes())
    content[info.offset : info.offset + info.length] = pickle.dumps(Attack()).ljust(info.length, b"\0")
    data.write_bytes(content)
    assert list(load(str(folder)).weights) == ["0.weight", "0.bias", "n"]
    assert capsys.readouterr().out == ""


def test_a_part_that_is_an_attack(folder, capsys):
    data = next(folder.glob("*.distcp"))
    table = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    info = next(info for index, info in table.items() if index.fqn == "model.0.weight")
    torch.save(Attack(), folder / "a.pt")
    evil = (folder / "a.pt").read_bytes()

    def replace(metadata) -> None:
        place = next(place for place in metadata.storage_data.values() if place.offset == info.offset)
        place.offset, place.length = data.stat().st_size, len(evil)

    changed(folder, replace)
    data.write_bytes(data.read_bytes() + evil)
    assert "builtins.print" in refusal(folder)
    assert capsys.readouterr().out == ""


def grow(metadata) -> None:
    tensor = metadata.state_dict_metadata["model.0.weight"]
    tensor.size = tensor.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])


def part(metadata) -> None:
    metadata.state_dict_metadata["model.0.weight"].size = torch.Size([8, 3])


def twice(metadata) -> None:
    tensor = metadata.state_dict_metadata["model.0.weight"]
    tensor.size = torch.Size([8, 3])
    tensor.chunks.append(copy.deepcopy(tensor.chunks[0]))


def outside(metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../ckpt/__0_0.distcp"


def beyond(metadata) -> None:
    for info in metadata.storage_data.values():
        info.offset = 1 << 40


def nowhere(metadata) -> None:
    metadata.storage_data = {}


def strange(metadata) -> None:
    metadata.state_dict_metadata = 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (grow, "its tensor model.0.weight has fewer bytes than its shape needs"),
        (part, "its parts of model.0.weight do not make up the whole"),
        (twice, "its parts of model.0.weight do not make up the whole"),
        (outside, "its part ../ckpt/__0_0.distcp lies outside the folder"),
        (beyond, "its part __0_0.distcp has fewer bytes than .metadata says"),
        (nowhere, "its .metadata does not say where model.0.weight lies"),
        (strange, "its .metadata is malformed"),
    ],
)
def test_metadata_that_lies(folder, change, reason):
    changed(folder, change)
    assert refusal(folder).startswith(reason)


def test_parts_of_several_processes(folder):
    weight = torch.arange(12.0).reshape(4, 3)
    torch.save(weight[:1].clone(), folder / "one")
    torch.save(weight[1:].clone(), folder / "two")
    first, second = (folder / "one").read_bytes(), (folder / "two").read_bytes()
    (folder / "__1_0.distcp").write_bytes(first + second)

    def split(metadata) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        tensor = metadata.state_dict_metadata["model.0.weight"]
        tensor.chunks = [
            ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 3])),
            ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([3, 3])),
        ]
        places = ((0, 0, len(first)), (1, len(first), len(second)))
        for row, start, length in places:
            index = MetadataIndex("model.0.weight", torch.Size([row, 0]), row)
            metadata.storage_data.pop(index, None)
            metadata.storage_data[index] = _StorageInfo("__1_0.distcp", start, length)

    changed(folder, split)
    assert torch.equal(load(str(folder)).weights["0.weight"], weight)


def test_truncated_parts_and_metadata(folder):
    whole = (folder / ".metadata").read_bytes()
    for cut in (1, 100, len(whole) // 2, len(whole) - 1):
        (folder / ".metadata").write_bytes(whole[:cut])
        refusal(folder)
    (folder / ".metadata").unlink()
    assert refusal(folder).startswith("its parts (*.distcp) lack the .metadata beside them")


def test_into_an_architecture(folder, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    m = nn.Sequential(nn.Linear(3, 4))\n"
        "    m.register_buffer('n', torch.tensor(0))\n    return m\n"
    )
    loaded = load(str(folder), model_target=f"{tmp_path}/net.py:make")
    assert isinstance(loaded.module, nn.Sequential)
    assert loaded.module.n.item() == 3
