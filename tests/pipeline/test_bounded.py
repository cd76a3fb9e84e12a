"""Bounded work: memory that does not grow with the probe, and limits on what is kept of it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import emscan
from emscan.measure import limits
from emscan.probe.mapped import Pages

_LONG = """
import sys
import torch
from torch import nn
import emscan

ROWS, SIZE = 10_000_000, 32_768
net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Softmax(-1))
whole, rest = divmod(ROWS, SIZE)


def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def batches():
    x, y = torch.randn(SIZE, 8), torch.randint(0, 4, (SIZE,))
    for _ in range(whole):
        yield x + 0, y
    yield x[:rest] + 0, y[:rest]


marks = {}
report = emscan.audit(net, batches(), progress=lambda done, total, samples: marks.__setitem__(done, peak()))
print(report.probe.samples, report.layers[0].components.dead, report.layers[2].responsibility.calibration.targets)
print(marks[32], marks[whole // 2], marks[whole], peak())
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")


@needs_proc
def test_ten_million_rows_take_no_more_memory_than_a_few() -> None:
    ran = subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, timeout=300, check=True)
    said, peaks = ran.stdout.splitlines()
    early, middle, late, end = map(int, peaks.split())
    assert said == "10000000 [] 10000000"
    assert late - early < 6 * 1024  # KiB: allocators settle
    assert late - middle < 2048
    assert end - early < 8 * 1024


# ---- probe files --------------------------------------------------------------------------------
_SPARSE = """
import sys
from torch import nn
from emscan.load import LoadedModel
from emscan.pipeline import run
from emscan.probe import open_probe
from emscan.report.document import ModelInfo


def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


net = nn.Sequential(nn.Linear(16, 2), nn.ReLU())
before = peak()
probe = open_probe(sys.argv[1], net, batch_size=1 << 16)
marks = {0: peak()}
run(LoadedModel(net, None, ModelInfo(), []), probe, progress=lambda n, total, _: marks.__setitem__(n, peak()))
print(marks[0] - before, marks[max(marks)] - marks[4], probe.info.samples)
"""


def sparse(path: Path, rows: int) -> None:
    """A file of zeros that takes no room on the disk."""
    size = rows * 16 * 4
    if path.suffix == ".npy":
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 16)})
            file.truncate(file.tell() + size)
        return
    head = json.dumps({"x": {"dtype": "F32", "shape": [rows, 16], "data_offsets": [0, size]}}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + size)


@needs_proc
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_of_a_gigabyte_is_read_batch_by_batch(tmp_path: Path, suffix: str) -> None:
    rows = 16 << 20  # 1 GiB
    path = tmp_path / f"probe{suffix}"
    sparse(path, rows)
    ran = subprocess.run(
        [sys.executable, "-c", _SPARSE, str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    opening, running, samples = map(int, ran.stdout.split())
    assert samples == rows
    assert opening < 128 * 1024  # KiB; the first trials on it, and the digest
    assert running < 64 * 1024


def test_pages_that_are_handed_back_are_read_again(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(5000, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    net = nn.Sequential(nn.Linear(16, 2), nn.ReLU())
    path = str(tmp_path / "x.npy")
    from emscan.probe import open_probe

    probe = open_probe(path, net, batch_size=700)
    for _ in range(2):
        assert torch.cat([batch.args[0] for batch in probe]).equal(torch.from_numpy(x))


def test_memory_that_is_no_mapping_stays_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 4)))
    from emscan.probe.batch import Batch

    mine = torch.arange(1 << 16)
    Pages(str(tmp_path / "x.npy")).release(Batch((mine,), {}, None, len(mine)))
    assert mine.equal(torch.arange(1 << 16))


# ---- limits ---------------------------------------------------------------------------------------
class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, width), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x[:, :1])).mean(-1, keepdim=True) + torch.tanh(self.b(x))


def test_a_row_of_more_components_than_are_kept_says_so() -> None:
    rows = {row.name: row for row in emscan.audit(Wide(limits.IN_ONE_ROW + 1), torch.randn(3, 4)).layers}
    assert rows["a"].verdict == "hard"
    assert rows["a"].components is None
    assert rows["a"].note == "not measured: 4,194,305 components, more than the 4,194,304 that are kept of one row"
    assert "unmeasured" in rows["a"].flags
    assert rows["b"].components.count == 3


def test_rows_that_together_are_more_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IN_ALL_ROWS", 40)
    net = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5)
    )
    layers = emscan.audit(net, torch.randn(9, 4), targets=torch.arange(9) % 5).layers
    assert [row.components.count if row.components else None for row in layers] == [16, 16, None, 5]
    assert "not measured: with its 16 components there would be more than the 40" in layers[2].note
    assert all(row.evidence is not None for row in layers if row.verdict == "em")


def test_more_rows_than_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROWS", 3)
    net = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())])
    layers = emscan.audit(net, torch.randn(9, 4)).layers
    assert [row.components is not None for row in layers] == [True, True, True, False, False]
    assert layers[4].note == "not measured: there are 3 measured rows already"


def test_a_softmax_over_more_alternatives_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IN_ONE_ROW", 100)
    net = nn.Sequential(nn.Linear(4, 200), nn.Softmax(-1))
    (row,) = emscan.audit(net, torch.randn(9, 4)).layers
    assert (row.verdict, row.components, row.responsibility) == ("em", None, None)
    assert row.note == "not measured: 200 components, more than the 100 that are kept of one row"


class Changing(nn.Module):
    """Lengths, factors and branches that no two batches share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x) * float(x[0, 0, 0]))
        for _ in range(x.shape[1] % 7):
            h = torch.sigmoid(self.b(h))
        return h.mT.softmax(-1) @ h


def test_shapes_and_branches_that_change_with_every_batch_add_no_rows() -> None:
    batches = [torch.randn(2, 2 + n % 50, 4) for n in range(150)]
    few, many = (emscan.audit(Changing(), batches[:n]) for n in (50, 150))
    assert [row.name for row in many.layers] == [row.name for row in few.layers]
    assert len(many.layers) <= 4
    for row in many.layers:
        assert row.components is None or row.components.count <= 5
