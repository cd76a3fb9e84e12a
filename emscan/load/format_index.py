"""Weights in several files, by the index beside them (`model.safetensors.index.json`): no code, no architecture."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emscan.load import shards
from emscan.load.registry import Content, Format, Options
from emscan.load.source import Source


class Sharded(Format):
    """An index of shards, given itself or found in a folder without `config.json`."""

    name = "sharded"
    title = "an index of shards"
    folders = True

    def matches(self, source: Source) -> bool:
        """Whether it is called like an index and starts like JSON."""
        return source.path.endswith(shards.INDEX_SUFFIX) and source.head.lstrip()[:1] in (b"{", b"[")

    def load(self, source: Source, options: Options) -> Content:
        """Return the tensors by name, in the order of the index."""
        files = shards.named(Path(source.path).parent, source)
        weights, digests, notes = shards.read(files, options)
        digest = hashlib.sha256("".join([source.sha256, *digests]).encode()).hexdigest()
        return Content(weights, notes=notes, sha256=digest)
