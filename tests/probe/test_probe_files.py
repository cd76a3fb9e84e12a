"""Probe files: every format, and a gallery of broken ones."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emscan.errors import ProbeError, UsageError
from emscan.probe import Probe, open_probe

N = 23
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(N) % 3
NET = nn.Linear(6, 3)


def joined(probe: Probe) -> tuple[Tensor, Tensor | None]:
    batches = list(probe)
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return torch.cat([batch.args[0] for batch in batches]), torch.cat(targets) if targets else None


def write(path: Path) -> str:
    match path.suffix:
        case ".safetensors":
            save_file({"images": X, "targets": Y}, path)
        case ".npz":
            np.savez_compressed(path, images=X.double().numpy(), targets=Y.numpy().astype(np.uint8))
        case ".npy":
            np.save(path, np.asfortranarray(X.double().numpy()))
        case ".pt":
            torch.save({"images": X, "targets": Y}, path)
    return str(path)


@pytest.mark.parametrize("name", ["p.safetensors", "p.npz", "p.npy", "p.pt"])
@pytest.mark.parametrize("batch_size", [None, 1, 5, 100])
def test_every_format_gives_the_same_samples(tmp_path, name, batch_size):
    path = write(tmp_path / name)
    probe = open_probe(path, NET, batch_size=batch_size)
    inputs, targets = joined(probe)
    assert torch.equal(inputs, X)
    assert inputs.dtype == torch.float32
    if name != "p.npy":
        assert torch.equal(targets, Y)
        assert targets.dtype == torch.int64
    size = batch_size or N
    assert probe.total_batches == probe.info.batches == -(-N // size)
    assert (probe.info.samples, probe.info.synthetic, probe.info.source) == (N, False, path)
    assert probe.info.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert torch.equal(joined(probe)[0], X)  # a second pass


@pytest.mark.parametrize("value", [X, [X], (X,)])
def test_tensors_without_names(tmp_path, value):
    torch.save(value, tmp_path / "p.pt")
    assert torch.equal(joined(open_probe(str(tmp_path / "p.pt"), NET))[0], X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_take_the_dtype_of_the_parameters_and_integers_stay(tmp_path, dtype):
    save_file({"a": X, "b": Y.to(torch.int32)}, tmp_path / "p.safetensors")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3, dtype=dtype)

        def forward(self, a, b):
            return self.fc(a)

    (batch,) = open_probe(str(tmp_path / "p.safetensors"), Two())
    assert [tensor.dtype for tensor in batch.args] == [dtype, torch.int32]


@pytest.mark.parametrize("code", [">f4", "<u2", "<u4", ">i8", "f2", "?"])
def test_foreign_number_formats(tmp_path, code):
    array = (np.arange(12).reshape(4, 3) % 2).astype(code)
    np.savez(tmp_path / "p.npz", x=array)
    (batch,) = open_probe(str(tmp_path / "p.npz"), nn.Identity())
    assert np.array_equal(batch.args[0].numpy(), array)


def test_a_batch_may_be_overwritten(tmp_path):
    probe = open_probe(write(tmp_path / "p.npy"), NET, batch_size=7)
    for batch in probe:
        batch.args[0].zero_()
    assert torch.equal(joined(probe)[0], X)


def test_large_default_batches_are_cut(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((3000, 4), np.float32))
    assert max(batch.samples for batch in open_probe(str(tmp_path / "p.npy"), nn.Linear(4, 2))) == 1024
    np.save(tmp_path / "p.npy", np.zeros((40, 3, 128, 128), np.float32))
    assert max(batch.samples for batch in open_probe(str(tmp_path / "p.npy"), nn.Conv2d(3, 2, 3))) == 21


def npz(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray, cut: int | None = None) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()[:cut]


def huge_npy() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)})
    return buffer.getvalue() + bytes(64)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensors(**values: Tensor) -> bytes:
    from safetensors.torch import save

    return save(values)


OBJECTS = np.array([{"a": 1}, None], dtype=object)
MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("p.safetensors", b"", "it is empty"),
    "cut safetensors": ("p.safetensors", tensors(x=X)[:-9], "it is damaged"),
    "header beyond the file": ("p.safetensors", b"\xff" * 7 + b"\x00{}", "it is damaged"),
    "no tensors": ("p.safetensors", tensors(), "holds no tensors"),
    "text as npy": ("p.npy", b"hello world, this is text", "it is damaged"),
    "cut npy": ("p.npy", npy(X.numpy(), -20), "it is cut short"),
    "huge npy": ("p.npy", huge_npy(), "it is cut short"),
    "objects in npy": ("p.npy", npy(OBJECTS), "pickled Python objects"),
    "strings in npy": ("p.npy", npy(np.array(["a", "b"])), "data, not numbers"),
    "records in npy": ("p.npy", npy(np.zeros(3, "i4,f4")), "data, not numbers"),
    "cut npz": ("p.npz", npz(**{"x.npy": npy(X.numpy())})[:-30], "it is damaged"),
    "objects in npz": ("p.npz", npz(**{"x.npy": npy(OBJECTS)}), "pickled Python objects"),
    "huge npz": ("p.npz", npz(**{"x.npy": huge_npy()}), "it is cut short"),
    "bomb": ("p.npz", npz(**{"x.npy": npy(np.zeros((2**25,), np.float32))}), "far more bytes"),
    "no array in npz": ("p.npz", npz(readme=b"hello"), "readme in it is no array"),
    "no npz": ("p.npz", b"PK\x03\x04 but no zip", "it is damaged"),
    "text as pt": ("p.pt", b"hello world, this is text", "it is plain text"),
    "cut pt": ("p.pt", saved(X)[:-40], "cut short or damaged"),
    "model as pt": ("p.pt", saved(NET), "it holds a Linear, not tensors"),
    "numbers as pt": ("p.pt", saved({"x": X, "n": 3}), "n in it is no named tensor"),
    "code as pt": ("p.pt", saved({"x": os.system}), "system"),
    "no samples": ("p.safetensors", tensors(x=X[:0]), "holds no sample"),
    "no sample axis": ("p.safetensors", tensors(x=torch.tensor(1.0)), "x has no sample axis"),
    "samples disagree": ("p.safetensors", tensors(x=X, targets=Y[:5]), "x 23, targets 5"),
    "another dimension": (
        "p.npz",
        npz(**{"x.npy": npy(X.numpy()), "w.npy": npy(X.numpy())}),
        "more than forward(input)",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_one_line(tmp_path, case):
    name, data, message = MALFORMED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ProbeError) as error:
        list(open_probe(str(tmp_path / name), NET))
    text = str(error.value)
    assert message in text
    assert str(tmp_path / name) in text
    assert "\n" not in text
    assert error.value.hint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.npz", "does not exist"),
        ("model.bin", "is no probe"),
        ("no.such.module:make", "there is no module no"),
        ("no_such_file.py:make", "there is no file no_such_file.py"),
        ("json:nothing", "json has no nothing"),
        ("random:cauchy", "there is no distribution cauchy"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises((ProbeError, UsageError), match=message):
        open_probe(spec, NET)


def test_a_folder_is_no_probe(tmp_path):
    (tmp_path / "p.npz").mkdir()
    with pytest.raises(ProbeError, match="is a folder"):
        open_probe(str(tmp_path / "p.npz"), NET)


def test_batch_sizes_are_positive(tmp_path):
    with pytest.raises(UsageError, match="not positive"):
        open_probe(write(tmp_path / "p.npy"), NET, batch_size=0)


@pytest.mark.parametrize("trust", [False, True])
def test_pickled_code_never_runs_without_trust(tmp_path, trust):
    class Touch:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "p.pt").write_bytes(saved({"x": Touch()}))
    with pytest.raises(ProbeError):
        open_probe(str(tmp_path / "p.pt"), NET, trust=trust)
    assert (tmp_path / "ran").exists() is trust
