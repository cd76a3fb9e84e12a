"""Zip archives that two readers would read differently, or that unpack to more than they are."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest

from tests.hostile.helpers import DECEIVED, PICKLE, refusal


def test_truncated_checkpoints(saved, written, network):
    data = Path(saved(network)).read_bytes()
    for size in range(4, len(data), 97):
        assert refusal(written(data[:size], "cut.pt")) == (
            "it is a zip archive that is cut short or damaged; copy or save it again"
        )


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
