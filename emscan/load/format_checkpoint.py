"""Files of torch.save since torch 1.6: a zip archive with a pickle (a module or tensors) and one record per storage."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch

from emscan.load import allowlist
from emscan.load.archive import Archive
from emscan.load.calls import DAMAGED, Storage, refuse
from emscan.load.graph import check_graph
from emscan.load.pickles import check
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, UnsafeError, guarded, printable
from emscan.load.unsafe import torch_load_unsafely

_BUDGET_FACTOR = 8
_BUDGET_FLOOR = 2**24


def budget(data: bytes) -> int:
    """Return the most bytes that one tensor of a file may present: expanded views are fine, bombs are not."""
    return max(_BUDGET_FLOOR, _BUDGET_FACTOR * len(data))


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
        return "data.pkl" in source.inside() and "constants.pkl" not in source.inside()

    def load(self, source: Source, options: Options) -> Content:
        """Load safely; what is unsafe only with ``options.trust``, and said so."""
        archive = Archive(source.data)
        try:
            machine = check(archive.pickle, 0, _Records(archive.sizes), budget(source.data))
            return Content(load_restricted(source.data, machine.names, options))
        except UnsafeError as error:
            if not options.trust:
                raise
            return torch_load_unsafely(source, options, error)


class _Records:
    """Checks the persistent ids of a zip checkpoint against the records that the archive has."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def __call__(self, identity: tuple[Any, ...]) -> Storage:
        """Return the storage of ``("storage", type, key, location, number of items)``."""
        item, key, count = storage_identity(identity, 5)
        if count * item > self.sizes.get(f"data/{key}", -1):
            raise RefusalError(f"its record data/{printable(key, 40)} holds fewer bytes than a tensor claims", DAMAGED)
        return Storage(count * item, item)


def storage_identity(identity: tuple[Any, ...], length: int) -> tuple[int, str, int]:
    """Return bytes per item, key and number of items of a persistent id with ``length`` parts."""
    if identity[:1] == ("module",):
        refuse("it is a module in the format of torch before 1.6, which carries its source code")
    if len(identity) != length or identity[0] != "storage":
        refuse("it refers to data outside its pickle in a way that torch.save does not")
    _, kind, key, location, count = identity[:5]
    item = allowlist.ITEM_SIZES.get(getattr(kind, "name", ""))
    if item is None or type(key) is not str or type(location) is not str or type(count) is not int or count < 0:
        refuse("it describes its data in a way that torch.save does not")
    return item, key, count
