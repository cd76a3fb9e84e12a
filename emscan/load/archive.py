"""Strict checks of the zip archive that torch.save writes, before torch reads it.

Two zip readers may see two different archives in one hostile file. So nothing is accepted that a writer of torch
does not write: no gap for a second directory, no compressed, repeated, overlapping or oddly named entry.
"""

from __future__ import annotations

import io
import struct
import zipfile

import torch

from emscan.load.source import RefusalError, guarded, printable

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_DAMAGED = "the file is damaged or was made to deceive: save it again with torch.save"


class Archive:
    """A checked archive: ``pickle`` is data.pkl as torch itself will read it, ``sizes`` the bytes of each record."""

    def __init__(self, data: bytes) -> None:
        with guarded("its zip archive is malformed"):
            self.sizes = _check(data)
            reader = torch._C.PyTorchFileReader(io.BytesIO(data))
            self.pickle = reader.get_record("data.pkl")
            seen = {name: reader.get_record_size(name) for name in reader.get_all_records()}
        if seen != self.sizes:
            raise RefusalError("its zip archive reads differently in two readers", _DAMAGED)


def _check(data: bytes) -> dict[str, int]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        directory = archive.start_dir
        records = {}
        position = 0
        root = entries[0].filename.partition("/")[0] if entries else ""
        for entry in entries:
            if entry.header_offset < position:
                raise RefusalError(
                    f"its zip entry {printable(entry.filename, 80)} overlaps or repeats another", _DAMAGED
                )
            _check_entry(entry, root)
            position = _end_of(entry, data, directory)
            record = entry.filename.partition("/")[2]
            if record in records:
                raise RefusalError(f"its zip entry {printable(entry.filename, 80)} appears twice", _DAMAGED)
            records[record] = entry.file_size
    _check_end(data, directory, len(entries))
    return records


def _check_entry(entry: zipfile.ZipInfo, root: str) -> None:
    name = printable(entry.filename, 80)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise RefusalError(f"its zip entry {name} is compressed, which torch.save never does", _DAMAGED)
    if entry.flag_bits & 0x1:
        raise RefusalError(f"its zip entry {name} is encrypted", _DAMAGED)
    # orig_filename keeps what follows a NUL, which filename drops.
    parts = entry.orig_filename.split("/")
    if entry.orig_filename != entry.filename or "\\" in entry.filename or not parts[0] or {"", "..", "."} & {*parts}:
        raise RefusalError(f"its zip entry {name} has a path that points outside the archive", _DAMAGED)
    if parts[0] != root or len(parts) < 2:
        raise RefusalError(f"its zip entry {name} is not in the archive's one folder", _DAMAGED)


def _end_of(entry: zipfile.ZipInfo, data: bytes, directory: int) -> int:
    """Return where the entry's bytes end; its local header must tell the same story as the directory."""
    magic, _, flags, method, _, _, _, _, _, name_size, extra_size = _LOCAL_HEADER.unpack_from(data, entry.header_offset)
    start = entry.header_offset + _LOCAL_HEADER.size
    name = data[start : start + name_size]
    if magic != b"PK\x03\x04" or method != zipfile.ZIP_STORED or flags & 0x1 or name != entry.filename.encode():
        raise RefusalError(f"its zip entry {printable(entry.filename, 80)} has two contradicting headers", _DAMAGED)
    end = int(start + name_size + extra_size + entry.file_size)
    if end > directory:
        raise RefusalError(
            f"its zip entry {printable(entry.filename, 80)} claims more bytes than the file has", _DAMAGED
        )
    return end


def _check_end(data: bytes, directory: int, count: int) -> None:
    """Require one directory, right before the end record, and nothing after that."""
    start = len(data) - _END.size
    magic, disk, first, here, total, size, offset, comment = _END.unpack_from(data, start)
    wide = 0xFFFF in (here, total) or 0xFFFFFFFF in (size, offset)
    if magic != b"PK\x05\x06" or comment or disk not in (0, 0xFFFF) or first not in (0, 0xFFFF):
        raise RefusalError("its zip archive is followed by other bytes", _DAMAGED)
    if not wide and (offset != directory or here != count or total != count):
        raise RefusalError("its zip archive has bytes before it, or a second directory", _DAMAGED)
