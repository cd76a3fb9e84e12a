"""Archives of torch.export: they hold programs and pickles, so they are loaded only with --trust."""

from __future__ import annotations

import io
from typing import Any

import torch

from emscan.load.marks import is_export
from emscan.load.registry import Content, Format, Options, require_trust
from emscan.load.source import Source
from emscan.load.unsafe import load_unsafely


class Export(Format):
    """An exported program; the module that it gives keeps the parameters' names and cannot change its mode."""

    name = "torch-export"
    title = "a torch.export archive"
    suffixes = (".pt2",)

    def matches(self, source: Source) -> bool:
        """Whether there is the program, under its present or its former name."""
        return is_export(source.inside(), source.names or ())

    def load(self, source: Source, options: Options) -> Content:
        """Load with ``options.trust`` only."""
        require_trust(options, "it is a torch.export archive, which holds a program")
        value = load_unsafely(lambda: _load(source.data, options.device))
        return Content(value, trusted=True, notes=["loaded with --trust: a torch.export archive holds a program"])


def _load(data: bytes, device: torch.device) -> Any:
    program = torch.export.load(io.BytesIO(data))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()
