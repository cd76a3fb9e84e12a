"""Files of tensors: one reader per extension. Nothing in a file is executed, and pickled objects are refused."""

from __future__ import annotations

import ast
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from emscan.errors import ProbeError
from emscan.load.registry import Options, detect, formats
from emscan.load.source import ZIP_MAGIC, RefusalError, Source, brief, listing

DAMAGED = "save it again"
PLAIN = "save plain arrays of numbers"
_UNPACKED_FACTOR = 128  # an .npz may unpack to this many times its size: images are sparse, bombs are not
_UNPACKED_FLOOR = 2**26
_LONGEST_HEADER = 10_000  # bytes, as numpy itself allows
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name
_ENCRYPTED = 1
_WIDER = {"u2": np.int32, "u4": np.int64, "u8": np.int64}  # torch computes little in unsigned types beyond bytes


@dataclass(frozen=True)
class Contents:
    """The tensors of a file: ``named`` in order, or ``ordered`` where they have no names; ``sha256`` of its bytes."""

    named: dict[str, Tensor] | None
    ordered: list[Tensor] | None
    sha256: str


def read(path: str, *, trust: bool = False) -> Contents:
    """Read a file of tensors. Raises ProbeError for one that is malformed, empty or holds anything but numbers."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist" if not file.exists() else "is no regular file"
        raise ProbeError(f"the probe {path} {what}", f"give a file ({', '.join(READERS)})")
    try:
        if not file.stat().st_size:
            raise RefusalError("it is empty", DAMAGED)
        value = READERS[file.suffix.lower()](path, trust)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except RefusalError as error:
        raise ProbeError(f"cannot read the probe {path}: {error.reason}", error.hint) from None
    except Exception as error:  # parsers raise half a dozen types on malformed bytes
        raise ProbeError(f"cannot read the probe {path}: it is damaged ({brief(error)})", DAMAGED) from None
    if isinstance(value, Tensor):
        value = [value]
    if not value:
        raise ProbeError(f"the probe {path} holds no tensors", "save the model's inputs in it")
    return Contents(value, None, digest) if isinstance(value, dict) else Contents(None, value, digest)


def to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor over the memory of ``array`` where torch has its dtype; raises RefusalError for no numbers."""
    if array.dtype.kind not in "biufc":
        raise RefusalError(f"it holds {array.dtype} data, not numbers", PLAIN)
    code = f"{array.dtype.kind}{array.dtype.itemsize}"
    if code in _WIDER:
        if code == "u8" and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise RefusalError("it holds unsigned integers beyond 63 bits", PLAIN)
        array = array.astype(_WIDER[code])
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(np.asarray(array))


def _read_safetensors(path: str, _trust: bool) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        # The library keeps no order of its own; names are numbered, so 10 comes after 2.
        return {name: file.get_tensor(name) for name in sorted(file.keys(), key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,9})", name)]


def _read_npy(path: str, _trust: bool) -> Tensor:
    with Path(path).open("rb") as file:
        shape, fortran, dtype = _npy_header(file)
        _check_size(shape, dtype, os.fstat(file.fileno()).st_size - file.tell())
        if 0 in shape:  # nothing to map
            return to_tensor(np.empty(shape, dtype))
        order: Literal["F", "C"] = "F" if fortran else "C"
        # The file that was checked, not the path again. A batch's pages are read when it is cut.
        return to_tensor(np.memmap(file, dtype, mode="c", offset=file.tell(), shape=shape, order=order))


def _read_npz(path: str, _trust: bool) -> dict[str, Tensor]:
    budget = max(_UNPACKED_FLOOR, _UNPACKED_FACTOR * Path(path).stat().st_size)
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                raise RefusalError(f"{listing([entry.filename])} in it is no array", "write it with numpy.savez")
            name = entry.filename.removesuffix(".npy")
            budget -= entry.file_size  # of every entry: those of a hostile archive share their bytes
            if budget < 0:
                raise RefusalError("it unpacks to far more bytes than it has", "write it with numpy.savez")
            if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & _ENCRYPTED:
                tensors[name] = _mapped_entry(path, entry)
                continue
            tensors[name] = _npy_tensor(archive.read(entry))
    return tensors


def _mapped_entry(path: str, entry: zipfile.ZipInfo) -> Tensor:
    """Return an entry that is stored as it is, mapped: a batch's pages are read when it is cut."""
    with Path(path).open("rb") as file:
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != ZIP_MAGIC:
            raise RefusalError(f"it is damaged ({listing([entry.filename])} is not where the archive says)", DAMAGED)
        named, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = file.seek(entry.header_offset + _LOCAL_HEADER + named + extra)
        shape, fortran, dtype = _npy_header(file)
        held = min(start + entry.compress_size, Path(path).stat().st_size) - file.tell()
        _check_size(shape, dtype, held)
        if 0 in shape:  # nothing to map
            return to_tensor(np.empty(shape, dtype))
        order: Literal["F", "C"] = "F" if fortran else "C"
        return to_tensor(np.memmap(path, dtype, mode="c", offset=file.tell(), shape=shape, order=order))


def _npy_tensor(data: bytes) -> Tensor:
    stream = io.BytesIO(data)
    shape, fortran, dtype = _npy_header(stream)
    _check_size(shape, dtype, len(data) - stream.tell())
    array = np.frombuffer(data, dtype, offset=stream.tell(), count=math.prod(shape))
    return to_tensor(array.reshape(shape, order="F" if fortran else "C"))


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise RefusalError("it holds structured arrays", PLAIN)
    _check_literal(stream, 2 if version == (1, 0) else 4)
    one, two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, fortran, dtype = (one if version == (1, 0) else two)(stream)
    if dtype.hasobject:
        raise RefusalError("it holds pickled Python objects, which emscan does not load", PLAIN)
    return tuple(shape), fortran, dtype


def _check_literal(stream: Any, width: int) -> None:
    """Require that a header is a literal: numpy takes minutes to mend one of some kilobytes that is none."""
    start = stream.tell()
    size = int.from_bytes(stream.read(width), "little")
    text = stream.read(min(size, _LONGEST_HEADER + 1))
    stream.seek(start)
    try:
        if len(text) > _LONGEST_HEADER:
            raise ValueError("it is too long")
        ast.literal_eval(text.decode("latin1"))
    except Exception:  # several types, by what is wrong with it
        raise RefusalError("its header is malformed", DAMAGED) from None


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], held: int) -> None:
    wanted = math.prod(shape) * dtype.itemsize  # checked first: numpy allocates what the header claims
    if wanted > held:
        raise RefusalError(f"it is cut short ({held:,} of {wanted:,} bytes)", DAMAGED)


def _read_torch(path: str, trust: bool) -> Any:
    source = Source.read(path)
    try:
        kind = detect(source, [kind for kind in formats() if kind.either])
    except RefusalError as error:
        raise RefusalError(error.reason, "write it with torch.save") from None
    value = kind.load(source, Options(trust, torch.device("cpu"))).value
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value):
        return list(value)
    if isinstance(value, dict):
        alien = [str(name) for name, item in value.items() if not isinstance(item, Tensor) or not isinstance(name, str)]
        if not alien:
            return dict(value)
        raise RefusalError(f"{listing(alien)} in it is no named tensor", "save a dict of tensors")
    raise RefusalError(f"it holds a {type(value).__name__}, not tensors", "save a tensor or a dict of tensors")


READERS: dict[str, Callable[[str, bool], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
