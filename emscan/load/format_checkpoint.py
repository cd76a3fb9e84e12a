"""Files of torch.save since torch 1.6: a zip archive with a pickle (a module or tensors) and one record per storage."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from emscan.load import allowlist, extract
from emscan.load.archive import Archive
from emscan.load.calls import Storage
from emscan.load.graph import check_graph
from emscan.load.marks import is_checkpoint
from emscan.load.pickles import Machine, check
from emscan.load.placeholders import PlaceholderMachine
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, UnsafeError, guarded
from emscan.load.storages import Records, budget
from emscan.load.unsafe import torch_load_unsafely

NAMED = (
    "name the architecture with --model to take only the tensors from it, or pass --trust if you trust where the file "
    "comes from"
)
_Run: TypeAlias = Callable[[type[Machine]], tuple[Machine, Callable[[Storage], bytes]]]


def load_restricted(data: bytes, names: Iterable[str], options: Options) -> Any:
    """Return what torch's restricted unpickler makes of checked bytes that import ``names``, checked once more."""
    with (
        guarded("torch cannot read it"),
        torch.serialization.safe_globals(allowlist.torch_safe_globals(names)),
    ):
        value = torch.load(io.BytesIO(data), map_location=options.device, weights_only=True, mmap=False)
    check_graph(value)
    return value


class Checkpoint(Format):
    """A pickled nn.Module or a state_dict."""

    name = "torch"
    either = True
    title = "a torch checkpoint"
    suffixes = (".pt", ".pth", ".bin", ".ckpt")

    def matches(self, source: Source) -> bool:
        """Whether there is a data.pkl and nothing of TorchScript."""
        return is_checkpoint(source.inside())

    def load(self, source: Source, options: Options) -> Content:
        """Load safely; what is unsafe only with ``options.trust``, and said so."""
        archive = Archive(source.data)
        try:
            return Content(load_restricted(source.data, check_archive(archive, len(source.data)).names, options))
        except UnsafeError as error:
            return otherwise(source, options, error, lambda make: _tensors(source.data, archive, make))


def check_archive(archive: Archive, size: int, make: type[Machine] = Machine) -> Machine:
    """Return the machine after running the pickle of a checked archive of ``size`` bytes."""
    return check(archive.pickle, 0, Records(archive.sizes), budget(size), make)


def _tensors(data: bytes, archive: Archive, make: type[Machine]) -> tuple[Machine, Callable[[Storage], bytes]]:
    """Run the pickle on a lenient machine; returns it, and how to read a storage."""
    if data[slice(*_span(archive, "byteorder"))] not in (b"", b"little"):
        raise RefusalError("its numbers are big-endian")
    machine = check_archive(archive, len(data), make)

    def read(storage: Storage) -> bytes:
        start, _ = _span(archive, f"data/{storage.key}")
        return data[start : start + storage.size]

    return machine, read


def _span(archive: Archive, name: str) -> tuple[int, int]:
    record = archive.records.get(name)
    return (record.start, record.start + record.size) if record is not None else (0, 0)


def _extracted(options: Options, error: UnsafeError, run: _Run) -> Content | None:
    """Return the tensors of a file whose foreign names nothing needs; None where there is more wrong with it."""
    try:
        machine, read = run(PlaceholderMachine)
    except RefusalError:
        return None
    assert isinstance(machine, PlaceholderMachine)
    weights_only = not extract.allowed(machine, weights_only=False)
    if weights_only and not extract.allowed(machine, weights_only=True):
        return None
    if weights_only and not options.weights_only:
        raise UnsafeError(error.reason, NAMED)
    found = extract.extract(machine, read, options.device)
    return Content(found.value, notes=[extract.note(found, weights_only=weights_only)])


def otherwise(source: Source, options: Options, error: UnsafeError, run: _Run) -> Content:
    """Load a file that torch's restricted unpickler must not: its tensors alone, or all of it with --trust.

    ``run`` runs its pickle on a given machine and returns it and the reader of storages. Raises ``error`` otherwise.
    """
    if options.weights_only or not options.trust:
        found = _extracted(options, error, run)
        if found is not None:
            return found
    if not options.trust:
        raise error
    return torch_load_unsafely(source, options, error)
