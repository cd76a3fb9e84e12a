"""TorchScript archives: they hold programs, so they are loaded only with --trust."""

from __future__ import annotations

import io

import torch

from emscan.load.marks import is_torchscript
from emscan.load.registry import Content, Format, Options, require_trust
from emscan.load.source import Source
from emscan.load.unsafe import load_unsafely


class TorchScript(Format):
    """A scripted or traced module."""

    name = "torchscript"
    title = "a TorchScript archive"
    suffixes = (".ts", ".torchscript")

    def matches(self, source: Source) -> bool:
        """Whether there are constants, which every TorchScript archive has and torch.save never writes."""
        return is_torchscript(source.inside())

    def load(self, source: Source, options: Options) -> Content:
        """Load with ``options.trust`` only."""
        require_trust(options, "it is a TorchScript archive, which holds a program")
        value = load_unsafely(lambda: torch.jit.load(io.BytesIO(source.data), map_location=options.device))
        return Content(value, trusted=True, notes=["loaded with --trust: a TorchScript archive holds a program"])
