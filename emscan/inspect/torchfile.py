"""Files of torch.save, new and old, and TorchScript: their pickles run on symbols, their tensors stay on the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from emscan.inspect.document import TensorInfo
from emscan.inspect.lenient import LenientMachine
from emscan.inspect.names import pickle_info
from emscan.inspect.part import Entry, Part, View
from emscan.inspect.reader import MOST, Reader
from emscan.inspect.root import Root, read_root
from emscan.inspect.suspects import check_objects
from emscan.inspect.walk import Named, walk
from emscan.load.archive import Record, check_directory
from emscan.load.calls import DAMAGED, Tensor
from emscan.load.extract import allowed, inert
from emscan.load.imports import imports
from emscan.load.pickles import Machine, check
from emscan.load.placeholders import PlaceholderMachine
from emscan.load.source import RefusalError, UnsafeError, guarded, listing
from emscan.load.storages import LegacyFile, Records, budget, check_legacy

_WINDOW = 1 << 22  # bytes of a legacy file that usually hold its pickles
_SEARCHED = 1 << 21  # bytes of a pickle that does not run which are looked through for imports
_SCRIPT = "it is a TorchScript archive, which holds a program"
_TRUST = "if you trust where it comes from, pass --trust"
_STORAGES = {
    "BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Double": "float64", "Float": "float32", "Half": "float16", "Int": "int32",
    "Long": "int64", "Short": "int16", "Untyped": "uint8",
}  # fmt: skip


def records_of(file: Reader, compressed: tuple[str, ...] = ()) -> dict[str, Record]:
    """Return the records of an archive, after the loader's own checks of its directory."""
    with guarded("its zip archive is malformed"):
        return check_directory(cast(BinaryIO, file), file.size, compressed)


def text_of(file: Reader, records: dict[str, Record], name: str) -> str | None:
    """Return a short record as text, None where there is none."""
    record = records.get(name)
    if record is None or record.size > 100 or record.size != record.stored:
        return None
    return file.at(record.start, record.size).decode("utf-8", "replace").strip()


def read_checkpoint(file: Reader, name: str) -> Part:
    """Return what a zip archive of torch.save holds. Raises RefusalError where the loader finds it damaged."""
    records = records_of(file)
    pickled = _pickle(file, records, "data.pkl")
    part = Part("torch", "a torch checkpoint", metadata=_versions(file, records))
    sizes = Records({key: record.size for key, record in records.items()})
    root = _run(part, pickled, 0, lambda make: check(pickled, 0, sizes, budget(file.size), make))
    big = part.metadata.get("byteorder") == "big"
    _fill(part, root, name, lambda key: records[f"data/{key}"].start, big)
    return part


def read_torchscript(file: Reader, name: str) -> Part:
    """Return what a TorchScript archive holds; its programs are not looked into."""
    records = records_of(file, compressed=("code/",))
    pickled = _pickle(file, records, "data.pkl")
    part = Part("torchscript", "a TorchScript archive", metadata=_versions(file, records), whole=True)
    part.refusal = UnsafeError(_SCRIPT, _TRUST)
    machine = LenientMachine(
        pickled, storage=Records({key: r.size for key, r in records.items()}), budget=budget(file.size)
    )
    machine.run()
    programs = [key for key in records if key.startswith("code/") and key.endswith(".py")]
    part.metadata["programs"] = len(programs)
    _fill(part, machine.result, name, lambda key: records[f"data/{key}"].start, part.metadata.get("byteorder") == "big")
    return part


def read_legacy(file: Reader, name: str) -> Part:
    """Return what a file of torch.save before torch 1.6 holds. Raises RefusalError where it is damaged."""
    size = _WINDOW
    while True:
        data = file.at(0, min(size, MOST))
        part = Part("torch-legacy", "a torch checkpoint of before torch 1.6")
        made: list[LegacyFile] = []

        def attempt(make: type[Machine], data: bytes = data, made: list[LegacyFile] = made) -> Machine:
            made[:] = [check_legacy(data, file.size, file.at, make)]
            return made[0].machine

        try:
            root = _run(part, data, _after_headers(data), attempt)
            break
        except RefusalError:  # the pickles may be longer than what was read
            if len(data) == min(file.size, MOST):
                raise
            size *= 8
    header = made[0].header if made else None
    part.metadata["byteorder"] = (
        "little" if not isinstance(header, dict) or header.get("little_endian", True) else "big"
    )
    places = made[0].records if made else {}
    _fill(part, root, name, places.__getitem__, part.metadata["byteorder"] == "big")
    return part


def _after_headers(data: bytes) -> int:
    """Return where the fourth pickle begins, after the magic number, the version and the sizes of types."""
    position = 0
    for _ in range(3):
        position = Machine(data, position).run()
    return position


def _pickle(file: Reader, records: dict[str, Record], name: str) -> bytes:
    record = records.get(name)
    if record is None or record.size != record.stored:
        raise RefusalError(f"its {name} is missing", DAMAGED)
    return file.at(record.start, record.size)


def _versions(file: Reader, records: dict[str, Record]) -> dict[str, Any]:
    """Return what the archive says about itself."""
    found: dict[str, Any] = {}
    for key, record in (("zip_version", "version"), ("byteorder", "byteorder"), ("format_version", ".format_version")):
        text = text_of(file, records, record) or text_of(file, records, f".data/{record}")
        if text is not None:
            found[key] = text
    return found


def _run(part: Part, data: bytes, start: int, run: Callable[[type[Machine]], Machine]) -> Any:
    """Return the symbolic object: of the strict machine, or where that refuses, of more lenient ones, with the reason."""
    strict: Machine | None = None
    try:
        strict = run(Machine)
        check_objects(strict.result)
        part.pickle = pickle_info(strict, None)
        return strict.result
    except UnsafeError as error:
        part.refusal = error
    lenient: Any = None
    with contextlib.suppress(RefusalError):
        lenient = run(LenientMachine)
    names = [] if lenient is not None else imports(data[: start + _SEARCHED], start)[0]
    part.pickle = pickle_info(strict, lenient, names, part.refusal.reason)
    if lenient is not None:
        _extractable(part, run)
    machine = lenient or strict
    return machine.result if machine is not None else None


def _extractable(part: Part, run: Callable[[type[Machine]], Machine]) -> None:
    """Say whether the loader takes the tensors alone, without what foreign names stand for; as it decides itself."""
    try:
        done = run(PlaceholderMachine)
    except RefusalError:
        return
    assert isinstance(done, PlaceholderMachine)
    if allowed(done, weights_only=False):
        part.refusal = None
        part.notes.append(f"records that are no tensors are not loaded: {listing(list(done.foreign), 8)}")
        assert part.pickle is not None
        part.pickle.refused = [one for one in part.pickle.refused if not inert(one.name)]
    elif allowed(done, weights_only=True):
        part.tensors_only = True


def _fill(part: Part, value: Any, name: str, place: Callable[[str], int], big: bool) -> None:
    """Put the tensors and modules of a symbolic object into ``part``."""
    root: Root = read_root(value)
    found = walk(value)
    part.modules = found.modules
    part.metadata |= root.metadata
    part.notes += root.notes
    part.whole = part.whole or root.module
    if part.format in ("torch", "torch-legacy"):
        part.format += "-module" if root.module else "-state-dict"
    if isinstance(value, Tensor):
        part.refusal = RefusalError("it holds one tensor, not a model", "pass it with --probe if it is the input")
    elif not found.tensors and not root.module and part.refusal is None:
        part.refusal = RefusalError("it holds no tensors", "save a module or its state_dict")
    part.tensors_only = part.tensors_only and bool(found.tensors)
    for named in found.tensors:
        weight = named.tensor.trained if part.format == "torchscript" else root.counts(named)
        part.entries.append(_entry(named, name, place, big, weight))


def _entry(named: Named, file: str, place: Callable[[str], int], big: bool, weight: bool) -> Entry:
    tensor: Tensor = named.tensor
    dtype = tensor.dtype.removeprefix("torch.") or _dtype(tensor.storage.kind)
    info = TensorInfo(named.name, dtype, list(tensor.shape), tensor.count * tensor.item, file)
    view = None
    with contextlib.suppress(KeyError):  # a record that the archive lacks
        view = View(place(tensor.storage.key), tensor.offset, tensor.shape, tensor.stride, big)
    same = (file, tensor.storage.key, tensor.offset, tensor.shape, tensor.stride, dtype)
    return Entry(info, view, weight, same)


def _dtype(storage: str) -> str:
    kind = storage.rpartition(".")[2].removesuffix("Storage")
    return _STORAGES.get(kind, kind.lower())
