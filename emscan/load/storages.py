"""The bytes behind the tensors of a torch.save file: how its pickle refers to them, and whether the file has them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from emscan.load import allowlist
from emscan.load.calls import DAMAGED, Storage, refuse
from emscan.load.pickles import Machine, check
from emscan.load.source import RefusalError, printable

_BUDGET_FACTOR = 8
_BUDGET_FLOOR = 2**24


def budget(size: int) -> int:
    """Return the most bytes that one tensor of a file of ``size`` bytes may present: expanded views are fine, bombs not."""
    return max(_BUDGET_FLOOR, _BUDGET_FACTOR * size)


class Records:
    """Checks the persistent ids of a zip checkpoint against the records that the archive has."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def __call__(self, identity: tuple[Any, ...]) -> Storage:
        """Return the storage of ``("storage", type, key, location, number of items)``."""
        storage = _storage(identity, 5)
        if storage.size > self.sizes.get(f"data/{storage.key}", -1):
            raise RefusalError(
                f"its record data/{printable(storage.key, 40)} holds fewer bytes than a tensor claims", DAMAGED
            )
        return storage


def _storage(identity: tuple[Any, ...], length: int) -> Storage:
    """Return the storage of a persistent id with ``length`` parts."""
    if identity[:1] == ("module",):
        refuse("it is a module in the format of torch before 1.6, which carries its source code")
    if len(identity) != length or identity[0] != "storage":
        refuse("it refers to data outside its pickle in a way that torch.save does not")
    _, kind, key, location, count = identity[:5]
    name = getattr(kind, "name", "")
    item = allowlist.ITEM_SIZES.get(name)
    if item is None or type(key) is not str or type(location) is not str or type(count) is not int or count < 0:
        refuse("it describes its data in a way that torch.save does not")
    return Storage(count * item, item, name, key)


@dataclass
class LegacyFile:
    """A checked file of torch.save before 1.6. ``records``: key -> where the bytes of its storage begin.

    ``header``: what its third pickle says, a dict with ``little_endian``.
    """

    machine: Machine
    header: Any
    records: dict[str, int] = field(default_factory=dict)


def check_legacy(
    data: bytes, size: int, read: Callable[[int, int], bytes], make: type[Machine] = Machine
) -> LegacyFile:
    """Check all five pickles, and that the storages which follow are those of the tensors.

    ``data``: the pickles at least; ``size``: bytes of the whole file, from which ``read(offset, count)`` reads.
    Raises UnsafeError or RefusalError.
    """
    position = 0
    for _ in range(3):  # magic number, version, type sizes
        header = Machine(data, position)
        position = header.run()
    storages = _LegacyStorages(size)
    machine = check(data, position, storages, budget(size), make)
    keys = Machine(data, machine.position)
    position = keys.run()
    named = type(keys.result) is list and all(type(key) is str for key in keys.result)
    if not named or sorted(keys.result) != sorted(storages.found):
        raise RefusalError("its list of storages is not the one that its tensors use", DAMAGED)
    records = {}
    for key in keys.result:
        storage = storages.found[key]
        stored = struct.unpack("<q", read(position, 8))[0] if position + 8 <= size else -1
        records[key] = position + 8
        position += 8 + storage.size
        if stored != storage.size // storage.item or position > size:
            raise RefusalError("its tensors claim more data than the file has", DAMAGED)
    return LegacyFile(machine, header.result, records)


class _LegacyStorages:
    """Checks the persistent ids of a legacy file; torch allocates each storage when it first meets its id."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.found: dict[str, Storage] = {}

    def __call__(self, identity: tuple[Any, ...]) -> Storage:
        """Return the storage of ``("storage", type, key, location, number of items, view)``."""
        storage = _storage(identity, 6)
        if storage.key not in self.found:
            self.found[storage.key] = storage
            self.free -= storage.size
        if self.free < 0:
            raise RefusalError("its tensors claim more data than the file has", DAMAGED)
        if self.found[storage.key] != storage or identity[5] is not None:
            refuse("it describes its data in a way that torch.save no longer does")
        return storage
