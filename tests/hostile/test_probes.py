"""Probe files that claim, or unpack to, more than they are, and probes that would run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from emscan.errors import ProbeError
from emscan.probe.files import read
from tests.hostile.helpers import Call, refused


def said(path) -> str:
    start = time.perf_counter()
    with pytest.raises(ProbeError) as caught:
        read(str(path))
    assert time.perf_counter() - start < 10
    return str(caught.value).removeprefix(f"cannot read the probe {path}: ")


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header.encode() + data


def claim(description: str, shape: str) -> str:
    return f"{{'descr': {description!r}, 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(claim("<f4", "(1000000000000,)"), bytes(8)), "it is cut short (8 of 4,000,000,000,000 bytes)"),
        (npy(claim("<f4", f"({2**62}, {2**62})"), bytes(8)), "it is cut short (8 of "),
        (npy(claim("<f4", "(-1,)"), bytes(8)), "it is damaged ("),
        (npy(claim("|O", "(1,)"), pickle.dumps([1])), "it holds pickled Python objects, which emscan does not load"),
        (npy(claim("<U9", "(1,)"), bytes(36)), "it holds <U9 data, not numbers"),
        (npy(claim("|V8", "(1,)"), bytes(8)), "it holds |V8 data, not numbers"),
        (npy(claim("<f4", "(1,)")[:-1] + " " * 4500, bytes(8)), "its header is malformed"),
        (npy("(" * 9000, bytes(8)), "its header is malformed"),
        (npy("-" * 9000 + "1", bytes(8)), "its header is malformed"),
        (npy(claim("<f4", "(1,)") + " " * 70_000, bytes(8), b"\x02\x00"), "its header is malformed"),
        (npy("__import__('os').system('true')", bytes(8)), "its header is malformed"),
        (npy(claim("<f4", "(1,)"), bytes(4), b"\x03\x00"), "it holds structured arrays"),
        (b"\x93NUMPY", "it is damaged ("),
    ],
)
def test_arrays(written, data, message):
    assert said(written(data, "p.npy")).startswith(message)


def test_archives_that_unpack_to_far_more(written):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(9):
            archive.writestr(f"{index}.npy", npy(claim("<f4", f"({2**22},)"), bytes(2**24)))
    assert said(written(buffer.getvalue(), "p.npz")).startswith("it unpacks to far more bytes than it has")


def test_entries_that_share_their_bytes(written):
    """A few kilobytes of directory would otherwise stand for any number of copies."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", npy(claim(">f8", f"({2**17},)"), bytes(2**20)))
        for index in range(400):
            copy = zipfile.ZipInfo(f"{index}.npy")
            first = archive.infolist()[0]
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            copy.file_size = copy.compress_size = first.file_size
            archive.filelist.append(copy)
    assert said(written(buffer.getvalue(), "p.npz")).startswith("it unpacks to far more bytes than it has")


def test_an_archive_with_something_else(written):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../x.txt", b"x")
    assert said(written(buffer.getvalue(), "p.npz")) == "../x.txt in it is no array; write it with numpy.savez"


def test_pickled_objects_in_an_archive(tmp_path, canary):
    np.savez(tmp_path / "p.npz", x=np.array([Call(os.system, f"touch {canary}")], dtype=object))
    assert said(tmp_path / "p.npz").startswith("it holds pickled Python objects")


def test_pickles(packed, written, canary):
    value = Call(os.system, f"touch {canary}")
    assert said(packed(pickle.dumps(value, 2), name="p.pt")).startswith("unpickling it would import ")
    assert said(written(pickle.dumps(value, 2), "q.pt")).startswith("it is a pickle that torch.save did not write")


def test_a_header_of_safetensors_that_lies(written):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    text = said(written(struct.pack("<Q", len(header)) + header + bytes(8), "p.safetensors"))
    assert text.startswith("it is damaged (")


def test_through_the_command_line(saved, written):
    probe = written(npy(claim("<f4", "(1000000000000,)"), bytes(8)), "p.npy")
    assert refused(saved(nn.Linear(2, 2)), "--probe", probe) == (
        f"cannot read the probe {probe}: it is cut short (8 of 4,000,000,000,000 bytes); save it again"
    )


def test_a_pipe_is_no_probe(tmp_path, saved):
    os.mkfifo(tmp_path / "p.npy")
    assert "is no regular file" in refused(saved(nn.Linear(2, 2)), "--probe", str(tmp_path / "p.npy"))


def test_expanded_tensors_do_not_dwarf_the_file(saved):
    path = saved({"x": torch.zeros(1).expand(2**30)}, "p.pt")
    assert "that repeats far less data" in said(path)
