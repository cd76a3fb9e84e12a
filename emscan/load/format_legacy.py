"""Files of torch.save before torch 1.6: five pickles, then the storages, with no archive around them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from emscan.load.calls import DAMAGED, Storage, refuse
from emscan.load.format_checkpoint import budget, load_restricted, storage_identity
from emscan.load.pickles import Machine, check
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, UnsafeError
from emscan.load.unsafe import torch_load_unsafely

LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save pickles first


class Legacy(Format):
    """Tensors in torch's older format; a module in it carries its source code and is refused."""

    name = "torch-legacy"
    either = True
    title = "a torch checkpoint"

    def matches(self, source: Source) -> bool:
        """Whether the first pickle is torch's magic number."""
        return source.data[2:].startswith(LEGACY_MAGIC)

    def load(self, source: Source, options: Options) -> Content:
        """Load safely; what is unsafe only with ``options.trust``, and said so."""
        try:
            return Content(load_restricted(source.data, _check(source.data), options))
        except UnsafeError as error:
            if not options.trust:
                raise
            return torch_load_unsafely(source, options, error)


def _check(data: bytes) -> Iterable[str]:
    """Check all five pickles, and that the storages which follow are those of the tensors; returns the imports."""
    position = 0
    for _ in range(3):  # magic number, version, type sizes
        position = Machine(data, position).run()
    storages = _Storages(len(data))
    machine = check(data, position, storages, budget(data))
    position = machine.position
    keys = Machine(data, position)
    position = keys.run()
    named = type(keys.result) is list and all(type(key) is str for key in keys.result)
    if not named or sorted(keys.result) != sorted(storages.found):
        raise RefusalError("its list of storages is not the one that its tensors use", DAMAGED)
    for key in keys.result:
        item, count = storages.found[key]
        stored = struct.unpack_from("<q", data, position)[0] if position + 8 <= len(data) else -1
        position += 8 + count * item
        if stored != count or position > len(data):
            raise RefusalError("its tensors claim more data than the file has", DAMAGED)
    return machine.names


class _Storages:
    """Checks the persistent ids of a legacy file; torch allocates each storage when it first meets its id."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.found: dict[str, tuple[int, int]] = {}  # key -> bytes per item, number of items

    def __call__(self, identity: tuple[Any, ...]) -> Storage:
        """Return the storage of ``("storage", type, key, location, number of items, view)``."""
        item, key, count = storage_identity(identity, 6)
        if key not in self.found:
            self.found[key] = (item, count)
            self.free -= item * count
        if self.free < 0:
            raise RefusalError("its tensors claim more data than the file has", DAMAGED)
        if self.found[key] != (item, count) or identity[5] is not None:
            refuse("it describes its data in a way that torch.save no longer does")
        return Storage(count * item, item)
