"""Headers only, bounded reads, nothing executed, nothing that blocks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch

from emscan.errors import LoadError
from emscan.inspect import inspect
from emscan.inspect import reader as reader_module
from emscan.load import source as source_module
from tests.inspect.conftest import entry, header_of


@pytest.fixture
def counted(monkeypatch):
    """Count every byte that is read of any file."""
    total = [0]

    class Counting:
        def __init__(self, file):
            self.file = file

        def read(self, count=-1):
            data = self.file.read(count)
            total[0] += len(data)
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    real = source_module.open_regular

    def opening(path):
        file, size = real(path)
        return Counting(file), size

    monkeypatch.setattr(source_module, "open_regular", opening)
    monkeypatch.setattr(reader_module, "open_regular", opening)
    return total


def test_a_folder_of_100_gigabytes_is_read_by_its_headers(sharded, counted):
    folder = sharded(count=20, gigabytes=5)
    found = inspect(str(folder))
    assert found.bytes > 99_000_000_000
    assert found.totals.tensors == 160
    assert found.totals.parameters == pytest.approx(50e9, rel=0.01)
    assert found.audit.command == f"emscan audit {folder}"
    # The first bytes of each shard, which tell its format, and its header: nothing else.
    assert counted[0] < 20 * (1 << 17)


def test_one_file_of_100_gigabytes(tmp_path, counted):
    path = tmp_path / "w.safetensors"
    size = 100_000_000_000
    header = header_of({"w": entry("U8", [size], 0, size)})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    assert inspect(str(path)).totals.bytes == size
    assert counted[0] < 1 << 17


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_is_read_without_its_tensors(saved, counted, legacy):
    path = saved({"w": torch.zeros(4_000_000)}, _use_new_zipfile_serialization=not legacy)
    assert inspect(path).totals.bytes == 16_000_000
    assert counted[0] < 5_000_000 if legacy else counted[0] < 200_000


@pytest.mark.parametrize("values", [False, True])
def test_torch_is_not_imported_for_weights(saved, raw, values):
    paths = [
        saved({"state_dict": {"w": torch.ones(2)}}, "a.pt"),
        saved({"w": torch.ones(2)}, "b.pt", _use_new_zipfile_serialization=False),
        raw('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    ]
    code = (
        "import sys; from emscan.inspect import inspect; from emscan.inspect.table import render_text\n"
        f"for path in {paths!r}: render_text(inspect(path, check_values={values}))\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_a_pipe_does_not_block_and_a_device_is_refused(tmp_path):
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    for path in (str(pipe), "/dev/zero"):
        with pytest.raises(LoadError, match=r"cannot inspect .*: it is no regular file; give the path of a model file"):
            inspect(path)


class Call:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def test_nothing_is_executed(tmp_path, saved, written, packed):
    sung = tmp_path / "sung"
    call = Call(os.system, f"touch {sung}")
    paths = [
        saved({"w": torch.ones(1), "evil": call}, "a.pt"),
        saved({"w": torch.ones(1), "evil": call}, "b.pt", _use_new_zipfile_serialization=False),
        packed(pickle.dumps(call, 4), name="c.pt"),
        *(written(pickle.dumps(call, protocol), f"d{protocol}.pkl") for protocol in range(6)),
        written(b"cos\nsystem\n(S'touch " + str(sung).encode() + b"'\ntR.", "e.pkl"),
        written(b"(cos\nsystem\nS'touch " + str(sung).encode() + b"'\no.", "f.pkl"),
        written(b"(S'touch " + str(sung).encode() + b"'\nios\nsystem\n.", "g.pkl"),
    ]
    for path in paths:
        found = inspect(path, check_values=True)
        refused = {one.name: one.reason for one in found.pickle.refused}
        system = next(name for name in refused if name.endswith(".system"))
        assert refused[system] == "it is not on the safe list, and it would be called"
        assert found.audit.needs_trust
        assert found.audit.command.endswith(" --trust")
    assert not sung.exists()
