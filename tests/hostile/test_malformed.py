"""Files that are no model, or no longer one, each with its message."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch

from emscan.load.foreign import READABLE
from tests.hostile.helpers import refusal


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
        (b'{"weight_map": {}}', "m.json", "it is a JSON document; READABLE"),
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
        ([2.0], "it holds a list, not a model; save a module or its state_dict"),
        (3, "it holds a int, not a model; save a module or its state_dict"),
    ],
)
def test_checkpoints_without_a_model(saved, value, message):
    assert refusal(saved(value)) == message
