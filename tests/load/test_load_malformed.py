"""A gallery of files that are no model, or no longer one, each with its message."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from emscan.errors import LoadError
from emscan.load import LoadedModel, load
from emscan.load.foreign import READABLE

DAMAGED = "the file is damaged: copy or save it again"
DECEIVED = "the file is damaged or was made to deceive: save it again with torch.save"


def refusal(path: str) -> str:
    with pytest.raises(LoadError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"cannot load {path}: ")
    return text.removeprefix(f"cannot load {path}: ")


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "m.pt", "it is an empty file; copy or save it again"),
        (b"GGUF\x03\x00\x00\x00", "m.gguf", "it is a GGUF model; READABLE"),
        (b"\x89HDF\r\n\x1a\n\x00", "m.h5", "it is an HDF5 file (Keras); READABLE"),
        (b"\x08\x07\x12\x07pytorch\x1a", "m.bin", "it is an ONNX model, NO_CHECKPOINT"),
        (b"\x08\x07\x12\x07pytorch\x1a", "m.onnx", "it is an ONNX model; READABLE"),
        (b"\x1c\x00\x00\x00TFL3", "m.tflite", "it is a TensorFlow Lite model; READABLE"),
        (b"\x93NUMPY\x01\x00", "m.npy", "it is a NumPy array; READABLE"),
        (b"\x1f\x8b\x08\x00", "m.pt.gz", "it is a gzip archive; READABLE"),
        (b'{"weight_map": {}}', "m.safetensors.index.json", "it is a JSON document; READABLE"),
        (b"hello\n", "m.txt", "it is plain text; READABLE"),
        ("h\u00e9llo w\u00f6rld\n".encode() * 99, "m.pt", "it is plain text, NO_CHECKPOINT"),
        (b"<!DOCTYPE html><html>", "m.pt", "it is an HTML page; a download may have failed: fetch the file again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "m.pt",
            "it is a Git LFS pointer, not the file it stands for; fetch it with `git lfs pull`",
        ),
        (b"\xfe\xed" * 40, "m.pt", "it is of no format that emscan knows, NO_CHECKPOINT"),
        (
            b"\x00\x01",
            "m.safetensors",
            "it is of no format that emscan knows, not a safetensors file as its name says; " + READABLE,
        ),
        (
            b"PK\x03\x04 and then nothing",
            "m.pt",
            "it is a zip archive that is cut short or damaged; copy or save it again",
        ),
    ],
)
def test_files_that_are_something_else(written, data, name, message):
    assert refusal(written(data, name)) == message.replace(
        "NO_CHECKPOINT", "not a torch checkpoint as its name says; READABLE"
    ).replace("READABLE", READABLE)


def test_archives_that_are_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    assert refusal(str(tmp_path / "a.npz")) == f"it is a NumPy archive of arrays; pass arrays with --probe; {READABLE}"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert refusal(str(tmp_path / "b.zip")) == f"it is a zip archive that holds no model; {READABLE}"


def test_paths(tmp_path, written, monkeypatch):
    assert refusal(str(tmp_path / "absent.pt")) == "there is no such file; check the path"
    hint = "give the file inside that holds the weights"
    assert refusal(str(tmp_path)) == f"it is a folder; {hint}"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(str(tmp_path / "pipe")) == "it is no regular file; give the path of a model file"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(str(tmp_path / "loop")).startswith("it cannot be read (OSError: ")
    assert refusal("nul\0byte").startswith("it cannot be read (ValueError: ")

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = written(b"x")
    monkeypatch.setattr(os, "open", denied)
    assert refusal(path) == "permission to read it is denied; check the rights of the file"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "it holds no tensors; save a module or its state_dict"),
        ({"epoch": 3}, "it holds no tensors; save a module or its state_dict"),
        (torch.ones(2), "it holds one tensor, not a model; pass it with --probe if it is the input"),
        ([torch.ones(2)], "it holds a list, not a model; save a module or its state_dict"),
        (3, "it holds a int, not a model; save a module or its state_dict"),
    ],
)
def test_checkpoints_without_a_model(saved, value, message):
    assert refusal(saved(value)) == message


def test_truncated_checkpoints(saved, written, network):
    data = Path(saved(network)).read_bytes()
    for size in range(4, len(data), 97):
        assert refusal(written(data[:size], "cut.pt")) == (
            "it is a zip archive that is cut short or damaged; copy or save it again"
        )


PICKLE = b"\x80\x02}X\x01\x00\x00\x00wNs."


def test_compressed_entries(packed):
    path = packed(PICKLE, {"data/0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    assert refusal(path) == f"its zip entry archive/data.pkl is compressed, which torch.save never does; {DECEIVED}"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_entries(written):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    assert refusal(written(buffer.getvalue())) == f"its zip entry archive/data.pkl appears twice; {DECEIVED}"


@pytest.mark.parametrize("name", ["archive/../../x", "archive//x", "archive/a\\b", "archive/./x"])
def test_entries_that_point_elsewhere(packed, name):
    path = packed(PICKLE, {name.removeprefix("archive/"): b"x"})
    text = refusal(path)
    assert text.endswith(f"has a path that points outside the archive; {DECEIVED}")


def test_entries_outside_the_folder(written):
    for other in ("other/x", "x"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", PICKLE)
            archive.writestr(other, b"x")
        assert (
            refusal(written(buffer.getvalue()))
            == f"its zip entry {other} is not in the archive's one folder; {DECEIVED}"
        )


def edited(path: str, change) -> bytes:
    data = bytearray(Path(path).read_bytes())
    change(data, data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06"))
    return bytes(data)


def test_headers_that_contradict_each_other(packed, written):
    def rename(data, directory, end):
        data[30 : 30 + 16] = b"archive/evil.pkl"

    def enlarge(data, directory, end):
        struct.pack_into("<2I", data, directory + 20, 10**9, 10**9)

    def overlap(data, directory, end):
        second = data.index(b"PK\x01\x02", directory + 4)
        struct.pack_into("<I", data, second + 42, 0)

    path = packed(PICKLE)
    name = "its zip entry archive/"
    assert refusal(written(edited(path, rename), "a.pt")) == f"{name}data.pkl has two contradicting headers; {DECEIVED}"
    assert refusal(written(edited(path, enlarge), "b.pt")).startswith(f"{name}data.pkl claims more bytes than the file")
    assert refusal(written(edited(path, overlap), "c.pt")) == f"{name}byteorder overlaps or repeats another; {DECEIVED}"


def test_bytes_around_the_archive(packed, written):
    data = Path(packed(PICKLE)).read_bytes()
    for other in (data + b"\x00" * 8, data + data):
        text = refusal(written(other, "more.pt"))
        assert text.endswith(DECEIVED)


def test_safetensors_headers(written):
    def message(data: bytes) -> str:
        return refusal(written(data, "m.safetensors"))

    size = len(b"{}" * 3)
    assert message(struct.pack("<Q", 2**62) + b"{}" * 3) == (
        f"its header claims {2**62:,} bytes, more than the file has; {DAMAGED}"
    )
    assert message(struct.pack("<Q", size) + b"{}" * 3).startswith("its header is malformed (SafetensorError: ")
    for entry in (
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"??","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    ):
        text = message(struct.pack("<Q", len(entry)) + entry + bytes(4))
        assert text.startswith("its header is malformed (")
        assert text.endswith(DAMAGED)
    assert message(struct.pack("<Q", 2) + b"{}") == "it holds no tensors; save a module or its state_dict"


def originals() -> dict[str, bytes]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LSTM(3, 2))
    files = {"safetensors": safetensors.torch.save(module.state_dict())}
    for name, value, zipped in (
        ("module", module, True),
        ("state", module.state_dict(), True),
        ("old", module.state_dict(), False),
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        files[name] = buffer.getvalue()
    return files


ORIGINALS = originals()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(ORIGINALS)), st.integers(0, 2**32 - 1), st.integers(1, 8), st.booleans())
def test_mutations_give_a_model_or_a_load_error(tmp_path, kind, seed, count, cut):
    chooser = random.Random(seed)
    data = bytearray(ORIGINALS[kind])
    for _ in range(count):
        data[chooser.randrange(len(data))] = chooser.randrange(256)
    path = tmp_path / "mutant.pt"
    path.write_bytes(data[: chooser.randrange(len(data))] if cut else data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = str(path)
        try:
            assert isinstance(load(str(path)), LoadedModel)
        except LoadError as error:
            message = str(error)
    assert str(path) in message
    assert "\n" not in message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", bytes([40, *[0] * 7, 123])])
)
def test_random_bytes_give_a_load_error(tmp_path, tail, head):
    path = tmp_path / "random.bin"
    path.write_bytes(head + tail)
    with pytest.raises(LoadError):
        load(str(path))
