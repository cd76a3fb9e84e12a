"""Folders of torch.distributed.checkpoint: `.metadata` and `*.distcp`, put together by torch's own reader."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from emscan.load.archive import Archive
from emscan.load.calls import DAMAGED
from emscan.load.format_checkpoint import check_archive
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, guarded, listing
from emscan.load.weights import is_training_state


class Distributed(Format):
    """Weights without an architecture, in parts that several processes wrote. Its pickled records are left out."""

    name = "torch-distributed"
    title = "a torch.distributed checkpoint"
    folders = True

    def matches(self, source: Source) -> bool:
        """Whether it is the metadata that such a folder begins with."""
        return Path(source.path).name == ".metadata" and source.head[:1] == b"\x80"

    def load(self, source: Source, options: Options) -> Content:
        """Return the tensors, nested as they were saved, without the optimizer's."""
        from emscan.load import distributed

        folder = Path(source.path).parent
        parts = distributed.parse(source.data, folder)
        skipped = [name for name, path in parts.paths.items() if len(path) > 1 and is_training_state(path[0], None)]
        for name in skipped:
            del parts.metadata.state_dict_metadata[name]
        if not parts.metadata.state_dict_metadata:
            raise RefusalError("it holds no tensors of a model", "save the model's state_dict")
        flat, digest = _read(parts.metadata, folder)
        value: dict[str, Any] = {}
        for name, tensor in flat.items():
            _nest(value, parts.paths[name], tensor.to(options.device))
        left = [*parts.left, *skipped]
        notes = [f"records of the training were left out: {listing(left)}"] if left else []
        return Content(value, notes=notes, sha256=hashlib.sha256((source.sha256 + digest).encode()).hexdigest())


def _read(metadata: Any, folder: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors by flat name, through torch's reader, and a digest of the parts that were read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    digest = hashlib.sha256()

    class Reader(FileSystemReader):
        """torch's reader over checked metadata; every part is checked as a checkpoint before torch loads it."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

        def _slice_file(self, file: Any, sinfo: Any) -> Any:
            file.seek(sinfo.offset)
            data = file.read(sinfo.length)
            if len(data) != sinfo.length:
                raise RefusalError("its parts have fewer bytes than .metadata says", DAMAGED)
            digest.update(data)
            check_archive(Archive(data), len(data))
            return io.BytesIO(data)

    found: dict[str, Tensor] = {}
    try:
        with guarded("torch cannot read it"):
            _load_state_dict(found, Reader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    except CheckpointException as error:  # no Exception: it would pass every guard
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, Exception):
            raise cause from None  # an interrupt
        with guarded("torch cannot read it"):
            raise cause from None
    return found, digest.hexdigest()


def _nest(value: dict[str, Any], path: tuple[str, ...], tensor: Tensor) -> None:
    for key in path[:-1]:
        inner = value.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RefusalError("its .metadata puts one tensor inside another", DAMAGED)
        value = inner
    if path[-1] in value:
        raise RefusalError("its .metadata puts two tensors into one place", DAMAGED)
    value[path[-1]] = tensor
