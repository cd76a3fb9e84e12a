"""Loaders as people write them, and what is odd about a probe that runs."""

from __future__ import annotations

import json
import textwrap
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from emscan.errors import ProbeError
from emscan.probe import Probe, from_python, open_probe

X, Y = torch.arange(60.0).view(10, 6), torch.arange(10) % 3
CODE = """
    import collections, dataclasses
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

    X, Y = torch.arange(60.0).view(10, 6), torch.arange(10) % 3
    Named = collections.namedtuple("Named", "labels input")

    class Rows(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return X[index], int(Y[index])

    class Dicts(Rows):
        def __getitem__(self, index):
            return {"input": X[index], "labels": int(Y[index]), "file": f"{index}.png"}

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(X, Y.tolist())

    @dataclasses.dataclass
    class Class:
        input: torch.Tensor
        labels: torch.Tensor

    class Own:
        def __init__(self, rows):
            self.pixels = torch.stack([row[0] for row in rows])
            self.y = torch.tensor([row[1] for row in rows])
            self.note = "a collator's own"

    def stacked(rows):
        return torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])

    class Encoding(collections.UserDict):
        pass

    def pairs(): return DataLoader(Rows(), batch_size=4)
    def tensors(): return DataLoader(TensorDataset(X, Y), batch_size=4)
    def dicts(): return DataLoader(Dicts(), batch_size=4)
    def workers(): return DataLoader(Rows(), batch_size=4, num_workers=2)
    def stream(): return DataLoader(Stream(), batch_size=4)
    def encoding():
        return DataLoader(Rows(), batch_size=4, collate_fn=lambda r: Encoding(zip(("input", "labels"), stacked(r))))
    def named(): return DataLoader(Rows(), batch_size=4, collate_fn=lambda r: Named(*stacked(r)[::-1]))
    def classes(): return DataLoader(Rows(), batch_size=4, collate_fn=lambda r: Class(*stacked(r)))
    def own(): return DataLoader(Rows(), batch_size=4, collate_fn=Own)
    def lists(): return [{"input": X[:4].tolist(), "labels": Y[:4].tolist()}, {"input": X[4:].tolist(), "labels": Y[4:].tolist()}]
    def rows(): return Rows()
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("code") / "loaders.py"
    path.write_text(textwrap.dedent(CODE))
    return str(path)


FORMS = "pairs tensors dicts workers stream encoding named classes own lists rows".split()


@pytest.mark.parametrize("form", FORMS)
def test_loaders_give_inputs_and_targets_at_every_pass(code, form):
    probe = open_probe(f"{code}:{form}", nn.Linear(6, 3))
    for _ in range(2):
        batches = list(probe)
        assert torch.equal(torch.cat([batch.args[0] for batch in batches]), X)
        assert torch.equal(torch.cat([batch.targets for batch in batches]), Y)
    assert probe.info.samples == 10
    assert probe.total_batches == (None if form == "stream" else len(batches))


@pytest.mark.parametrize("form", ["dicts", "encoding", "named", "classes"])
def test_labels_go_to_forward_where_it_takes_them(code, form):
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, input: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:  # noqa: A002
            return self.fc(input)

    batches = list(open_probe(f"{code}:{form}", Labelled()))
    assert torch.equal(torch.cat([batch.kwargs["labels"] for batch in batches]), Y)
    assert all(len(batch.args) == 1 and batch.targets is None for batch in batches)


def test_a_data_set_gives_batches_and_draws_no_number(untouched_generators):
    model = nn.Linear(6, 3)
    with untouched_generators:
        batches = list(from_python(TensorDataset(X, Y), None, model, batch_size=4))
    assert [batch.samples for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.targets for batch in batches]), Y)


def test_objects_without_tensors_are_no_batch():
    with pytest.raises(ProbeError, match="batch 1 of the probe is a PosixPath"):
        list(from_python([Path("x")], None, nn.Linear(6, 3)))
    with pytest.raises(ProbeError, match="batch 1 of the probe holds no tensors; add the input of"):
        list(from_python([UserDict(file="a.png")], None, nn.Linear(6, 3)))


# ---- stored arrays in an .npz are mapped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_stored_entries_are_mapped_and_equal(tmp_path, order):
    array = np.asarray(np.random.default_rng(0).standard_normal((50, 6)), np.float32, order=order)
    np.savez(tmp_path / "p.npz", x=array, targets=np.arange(50) % 3)
    probe = open_probe(str(tmp_path / "p.npz"), nn.Linear(6, 3), batch_size=7)
    for _ in range(2):
        batches = list(probe)
        assert torch.equal(
            torch.cat([batch.args[0] for batch in batches]), torch.from_numpy(np.ascontiguousarray(array))
        )
        assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.arange(50) % 3)


def test_a_large_stored_probe_takes_little_memory(tmp_path):
    import subprocess
    import sys

    np.savez(tmp_path / "p.npz", x=np.zeros((1 << 21, 32), np.float32))  # 256 MiB
    program = f"""
import resource, torch
from torch import nn
from emscan.probe import open_probe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(batch.samples for batch in open_probe({str(tmp_path / "p.npz")!r}, nn.Linear(32, 2)))
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    total, grown = map(int, ran.stdout.split())
    assert total == 1 << 21
    assert grown < 100  # MiB


@pytest.mark.parametrize("where", ["header", "length", "shape"])
def test_damaged_stored_entries(tmp_path, where):
    path = tmp_path / "p.npz"
    np.savez(path, x=np.zeros((50, 6), np.float32))
    data = bytearray(path.read_bytes())
    if where == "header":
        data[0:4] = b"PK\x09\x09"
    elif where == "length":
        data[26:28] = b"\xff\x7f"
    else:
        at = data.index(b"(50, 6)")
        data[at : at + 7] = b"(59, 9)"
    path.write_bytes(data)
    with pytest.raises(ProbeError, match=r"p\.npz"):
        list(open_probe(str(path), nn.Linear(6, 3)))


# ---- notes -----------------------------------------------------------------------------------------------------------------


def notes(probe: Probe) -> list[str]:
    list(probe)
    list(probe)  # said once
    return probe.notes


def test_nan_is_said(tmp_path):
    values = np.zeros((10, 6), np.float32)
    values[7, 2] = np.nan
    np.save(tmp_path / "p.npy", values)
    assert notes(open_probe(str(tmp_path / "p.npy"), nn.Linear(6, 3), batch_size=4)) == [
        "the probe's input holds NaN, first in sample 7 (from 0): what is computed from it counts as not finite; "
        "replace it or leave it out"
    ]
    np.save(tmp_path / "p.npy", np.where(np.isnan(values), np.inf, values))
    assert notes(open_probe(str(tmp_path / "p.npy"), nn.Linear(6, 3))) == []


def test_pixels_that_nobody_normalized_are_said(tmp_path):
    fields = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    pixels = torch.arange(3 * 4 * 64.0).view(3, 4, 8, 8)[:, :3] % 256
    np.save(tmp_path / "p.npy", pixels.numpy())
    model = nn.Conv2d(3, 2, 3)
    assert notes(open_probe(str(tmp_path / "p.npy"), model, folder=tmp_path)) == [
        "the probe's input holds values from 0 to 191; the model's images are made so: values 0 to 1, "
        "mean 0.5,0.5,0.5 std 0.5,0.5,0.5 (from preprocessor_config.json)"
    ]
    assert notes(open_probe(str(tmp_path / "p.npy"), model)) == []
    np.save(tmp_path / "p.npy", (pixels / 127.5 - 1).numpy())
    assert notes(open_probe(str(tmp_path / "p.npy"), model, folder=tmp_path)) == []
