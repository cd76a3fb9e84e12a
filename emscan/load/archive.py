"""Strict checks of the zip archive that torch.save writes, before torch reads it.

Two zip readers may see two different archives in one hostile file. So nothing is accepted that a writer of torch
does not write: no gap for a second directory, no compressed, repeated, overlapping or oddly named entry.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

from emscan.load.source import RefusalError, guarded, printable

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_DAMAGED = "the file is damaged or was made to deceive: save it again with torch.save"


class Archive:
    """A checked archive: ``pickle`` is data.pkl as torch itself will read it, ``sizes`` the bytes of each record.

    ``records``: where those bytes lie.
    """

    def __init__(self, data: bytes) -> None:
        import torch

        with guarded("its zip archive is malformed"):
            self.records = check_directory(io.BytesIO(data), len(data))
            self.sizes = {name: record.size for name, record in self.records.items()}
            reader = torch._C.PyTorchFileReader(io.BytesIO(data))
            self.pickle = reader.get_record("data.pkl")
            seen = {name: reader.get_record_size(name) for name in reader.get_all_records()}
        if seen != self.sizes:
            raise RefusalError("its zip archive reads differently in two readers", _DAMAGED)


@dataclass(frozen=True)
class Record:
    """Where the bytes of an entry lie in the file: ``stored`` of them, ``size`` once they are unpacked."""

    start: int
    size: int
    stored: int


def check_directory(file: BinaryIO, size: int, compressed: tuple[str, ...] = ()) -> dict[str, Record]:
    """Return the records of the archive of ``size`` bytes in ``file`` by name, without the folder that holds them all.

    Reads the directory and the entries' own headers, never their bytes. ``compressed``: the folders whose records may be.
    Raises RefusalError, or whatever zipfile raises on a malformed archive.
    """
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        directory = archive.start_dir
    records: dict[str, Record] = {}
    position = 0
    root = entries[0].filename.partition("/")[0] if entries else ""
    for entry in entries:
        if entry.header_offset < position:
            raise RefusalError(f"its zip entry {printable(entry.filename, 80)} overlaps or repeats another", _DAMAGED)
        record = entry.filename.partition("/")[2]
        packed = entry.compress_type == zipfile.ZIP_DEFLATED and record.startswith(compressed)
        _check_entry(entry, root, packed)
        start = _start_of(entry, file, packed)
        position = start + entry.compress_size
        if position > directory:
            raise RefusalError(
                f"its zip entry {printable(entry.filename, 80)} claims more bytes than the file has", _DAMAGED
            )
        if record in records:
            raise RefusalError(f"its zip entry {printable(entry.filename, 80)} appears twice", _DAMAGED)
        records[record] = Record(start, entry.file_size, entry.compress_size)
    _check_end(file, size, directory, len(entries))
    return records


def _check_entry(entry: zipfile.ZipInfo, root: str, packed: bool) -> None:
    name = printable(entry.filename, 80)
    if not packed and (entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size):
        raise RefusalError(f"its zip entry {name} is compressed, which torch.save never does", _DAMAGED)
    if entry.flag_bits & 0x1:
        raise RefusalError(f"its zip entry {name} is encrypted", _DAMAGED)
    # orig_filename keeps what follows a NUL, which filename drops.
    parts = entry.orig_filename.split("/")
    if entry.orig_filename != entry.filename or "\\" in entry.filename or not parts[0] or {"", "..", "."} & {*parts}:
        raise RefusalError(f"its zip entry {name} has a path that points outside the archive", _DAMAGED)
    if parts[0] != root or len(parts) < 2:
        raise RefusalError(f"its zip entry {name} is not in the archive's one folder", _DAMAGED)


def _start_of(entry: zipfile.ZipInfo, file: BinaryIO, packed: bool) -> int:
    """Return where the entry's bytes start; its local header must tell the same story as the directory."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    magic, _, flags, method, _, _, _, _, _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    name = file.read(name_size)
    expected = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    if magic != b"PK\x03\x04" or method != expected or flags & 0x1 or name != entry.filename.encode():
        raise RefusalError(f"its zip entry {printable(entry.filename, 80)} has two contradicting headers", _DAMAGED)
    return int(entry.header_offset + _LOCAL_HEADER.size + name_size + extra_size)


def _check_end(file: BinaryIO, size: int, directory: int, count: int) -> None:
    """Require one directory, right before the end record, and nothing after that."""
    file.seek(size - _END.size)
    magic, disk, first, here, total, length, offset, comment = _END.unpack(file.read(_END.size))
    wide = 0xFFFF in (here, total) or 0xFFFFFFFF in (length, offset)
    if magic != b"PK\x05\x06" or comment or disk not in (0, 0xFFFF) or first not in (0, 0xFFFF):
        raise RefusalError("its zip archive is followed by other bytes", _DAMAGED)
    if not wide and (offset != directory or here != count or total != count):
        raise RefusalError("its zip archive has bytes before it, or a second directory", _DAMAGED)
