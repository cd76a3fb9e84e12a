"""Files of torch.save before torch 1.6: five pickles, then the storages, with no archive around them."""

from __future__ import annotations

from collections.abc import Callable

from emscan.load.calls import Storage
from emscan.load.format_checkpoint import load_restricted, otherwise
from emscan.load.marks import is_legacy
from emscan.load.pickles import Machine
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, UnsafeError
from emscan.load.storages import LegacyFile, check_legacy


class Legacy(Format):
    """Tensors in torch's older format; a module in it carries its source code and is refused."""

    name = "torch-legacy"
    either = True
    title = "a torch checkpoint"

    def matches(self, source: Source) -> bool:
        """Whether the first pickle is torch's magic number."""
        return is_legacy(source.head)

    def load(self, source: Source, options: Options) -> Content:
        """Load safely; what is unsafe only with ``options.trust``, and said so."""
        try:
            names = _checked(source.data).machine.names
            if "torch.storage.UntypedStorage" in names:
                raise RefusalError(
                    "it has numbers of a type (8-bit floats, unsigned) that torch cannot read from its older format",
                    "save it in torch's present format",
                )
            return Content(load_restricted(source.data, names, options))
        except UnsafeError as error:
            return otherwise(source, options, error, lambda make: _tensors(source.data, make))


def _tensors(data: bytes, make: type[Machine]) -> tuple[Machine, Callable[[Storage], bytes]]:
    """Run the pickle on a lenient machine; returns it, and how to read a storage."""
    file = _checked(data, make)
    if type(file.header) is not dict or file.header.get("little_endian") is not True:
        raise RefusalError("its numbers are big-endian")

    def read(storage: Storage) -> bytes:
        start = file.records[storage.key]
        return data[start : start + storage.size]

    return file.machine, read


def _checked(data: bytes, make: type[Machine] = Machine) -> LegacyFile:
    return check_legacy(data, len(data), lambda start, count: data[start : start + count], make)
