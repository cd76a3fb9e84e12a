"""Files without pickles: safetensors, NumPy arrays, the configuration of torch.export archives; from their headers."""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import replace
from typing import Any, BinaryIO, cast

from emscan.inspect.document import PickleInfo, TensorInfo
from emscan.inspect.part import Entry, Part, View
from emscan.inspect.reader import Reader
from emscan.inspect.torchfile import read_checkpoint, records_of, text_of
from emscan.load.calls import DAMAGED
from emscan.load.header import DTYPES, read_header
from emscan.load.keys import natural
from emscan.load.source import RefusalError, UnsafeError, guarded, printable

_TRUST = "if you trust where it comes from, pass --trust"
_PROBE = "give it to --probe, if it is the input of a model"
_NUMPY = {
    "f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64", "b1": "bool", "c8": "complex64", "c16": "complex128",
}  # fmt: skip
_ARRAY = re.compile(
    rb"\{'descr': (.{1,4000}?), 'fortran_order': (True|False), 'shape': \(([\d, ]{0,800})\),? *\}\s*", re.DOTALL
)
_HEADER = 10_000  # bytes of a NumPy header at most; NumPy itself allows no longer one
# The numbers that torch.export gives dtypes, and their bytes.
_EXPORT = {
    1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 6: ("float16", 2),
    7: ("float32", 4), 8: ("float64", 8), 10: ("complex64", 8), 11: ("complex128", 16), 12: ("bool", 1),
    13: ("bfloat16", 2), 28: ("uint16", 2), 29: ("float8_e4m3fn", 1), 30: ("float8_e5m2", 1),
}  # fmt: skip


def read_safetensors(file: Reader, name: str) -> Part:
    """Return the tensors of a safetensors file from its header."""
    header = read_header(file)
    part = Part("safetensors", "a safetensors file", metadata=dict(header.metadata))
    for span in sorted(header.tensors, key=lambda span: natural(span.name)):
        info = TensorInfo(span.name, DTYPES[span.dtype][0], span.shape, span.end - span.start, name)
        part.entries.append(Entry(info, View(span.start, 0, tuple(span.shape), contiguous(span.shape))))
    return part


def contiguous(shape: list[int]) -> tuple[int, ...]:
    """Return the strides of a tensor whose last axis runs fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_export(file: Reader, name: str) -> Part:
    """Return the weights of a torch.export archive from its own list of them; its program is not looked into."""
    records = records_of(file)
    part = Part("torch-export", "a torch.export archive", whole=True)
    part.refusal = UnsafeError("it is a torch.export archive, which holds a program", _TRUST)
    for key, record in (("archive_version", "archive_version"), ("byteorder", "byteorder")):
        text = text_of(file, records, record)
        if text is not None:
            part.metadata[key] = text
    part.metadata["programs"] = len([key for key in records if re.fullmatch(r"models/[^/]+\.json", key)])
    lists = [key for key in records if re.fullmatch(r"data/weights/\w+_weights_config\.json", key)]
    for key in lists:
        with guarded(f"its {key} is malformed"):
            table = json.loads(file.at(records[key].start, records[key].size))["config"]
            for tensor, entry in table.items():
                place = records.get(f"data/weights/{entry['path_name']}")
                part.entries.append(_exported(tensor, entry, place.start if place else None, name))
    for key, place in records.items():
        if key.endswith(".pt"):
            _add_inner(part, file.window(place.start, place.stored), key, name, weights="state_dict" in key)
    return part


def _add_inner(part: Part, file: Reader, key: str, name: str, *, weights: bool) -> None:
    """Add what a torch.save file inside an archive imports; in older archives one holds the ``weights``."""
    try:
        found = read_checkpoint(file, name)
    except RefusalError as error:
        part.notes.append(f"its {printable(key, 80)} is not looked into: {error.reason}")
        return
    part.pickle = part.pickle or PickleInfo()
    if found.pickle is not None:
        part.pickle.merge(found.pickle)
    if weights:
        part.entries += [replace(entry, view=None) for entry in found.entries]  # their places are the inner file's


def _exported(name: str, entry: dict[str, Any], start: int | None, file: str) -> Entry:
    meta = entry["tensor_meta"]
    shape, stride = ([int(size["as_int"]) for size in meta[key]] for key in ("sizes", "strides"))
    if not all(0 <= size < 2**63 for size in (*shape, *stride)) or len(shape) != len(stride) or len(shape) > 64:
        raise ValueError("a tensor has an absurd shape")
    dtype, item = _EXPORT.get(meta["dtype"], (f"dtype {meta['dtype']}", 0))
    info = TensorInfo(name, dtype, shape, math.prod(shape) * item if item else None, file)
    offset = int(meta["storage_offset"]["as_int"])
    raw = start is not None and not entry.get("use_pickle") and item and offset >= 0
    view = View(start or 0, offset, tuple(shape), tuple(stride)) if raw else None
    return Entry(info, view, bool(entry.get("is_param", True)), (file, entry["path_name"], offset, *shape, *stride))


def read_array(file: Reader, name: str) -> Part:
    """Return the array of a .npy file."""
    part = _arrays("numpy", "a NumPy array")
    _add_array(part, name, file.at(0, _HEADER), "", file.size, 0)
    return part


def read_arrays(file: Reader, name: str) -> Part:
    """Return the arrays of a .npz archive, from the first bytes of each."""
    part = _arrays("numpy-archive", "a NumPy archive of arrays")
    with guarded("its zip archive is malformed"), zipfile.ZipFile(cast(BinaryIO, file)) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                head = stream.read(_HEADER)
            _add_array(part, name, head, entry.filename.removesuffix(".npy"), entry.file_size, None)
    return part


def _arrays(name: str, title: str) -> Part:
    part = Part(name, title)
    part.refusal = RefusalError(f"it is {title}, not a model", _PROBE)
    return part


def _add_array(part: Part, file: str, head: bytes, name: str, size: int, start: int | None) -> None:
    wide = head[6:7] in (b"\x02", b"\x03")
    begin = 12 if wide else 10
    length = int.from_bytes(head[8:begin], "little")
    found = _ARRAY.fullmatch(head[begin : begin + length])
    if head[:6] != b"\x93NUMPY" or found is None:
        raise RefusalError(f"the header of its array {printable(name, 60)!r} is malformed".replace(" ''", ""), DAMAGED)
    shape = [int(part) for part in found[3].split(b",") if part.strip()]
    described = found[1].decode("latin1").strip("'")
    order, kind = described[:1], described[1:]
    if "O" in described:
        part.notes.append(f"its array {printable(name, 60)!r} holds Python objects, a pickle that can run code")
    dtype = _NUMPY.get(kind)
    count = math.prod(shape)
    if len(shape) > 64 or count >= 2**63:
        raise RefusalError("its array has an absurd shape", DAMAGED)
    item = int(kind[1:]) if dtype else None
    taken = count * item if item else None
    if taken is not None and taken > size - begin - length:
        raise RefusalError(f"its array {printable(name, 60)!r} claims more bytes than the file has", DAMAGED)
    info = TensorInfo(name, dtype or printable(described, 60), shape, taken, file)
    stride = contiguous(shape)
    view = View(start + begin + length, 0, tuple(shape), stride, order == ">") if dtype and start is not None else None
    part.entries.append(Entry(info, view, weight=False))
