"""Which reader a file needs, by its content as the loader tells formats."""

from __future__ import annotations

from collections.abc import Callable

from emscan.inspect.otherfile import FOREIGN, read_foreign, read_pickle
from emscan.inspect.part import Part
from emscan.inspect.reader import MOST, Reader
from emscan.inspect.torchfile import read_checkpoint, read_legacy, read_torchscript
from emscan.inspect.weightfile import read_array, read_arrays, read_export, read_safetensors
from emscan.load import marks
from emscan.load.foreign import describe
from emscan.load.imports import imports
from emscan.load.source import RefusalError, Source

ReadFile = Callable[[Reader, str], Part]


def reader_for(source: Source, file: Reader) -> ReadFile:
    """Return what reads the file; raises RefusalError that says what it is, where it is no model."""
    if source.names is not None:
        return _zip_reader(source)
    if marks.is_legacy(source.head):
        return read_legacy
    if marks.is_safetensors(source.head):
        return read_safetensors
    if marks.is_pickle(source.head):
        return read_pickle
    if source.head.startswith(b"\x93NUMPY"):
        return read_array
    what, hint = describe(source)
    if what in FOREIGN:
        return lambda reader, _: read_foreign(reader, what, hint)
    if marks.may_be_pickle(source.head, file.at(file.size - 1, 1)):
        found = imports(file.at(0, min(file.size, MOST)))
        if found[1]:
            return lambda reader, _: read_pickle(reader, _, found)
    raise RefusalError(f"it is {what}", hint)


def _zip_reader(source: Source) -> ReadFile:
    inside, names = source.inside(), source.names or ()
    if marks.is_torchscript(inside):
        return read_torchscript
    if marks.is_export(inside, names):
        return read_export
    if marks.is_checkpoint(inside):
        return read_checkpoint
    if names and all(name.endswith(".npy") for name in names):
        return read_arrays
    what, hint = describe(source)
    if what in FOREIGN:
        return lambda reader, _: read_foreign(reader, what, hint)
    raise RefusalError(f"it is {what}", hint)
