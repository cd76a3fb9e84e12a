"""Files of safetensors: a JSON header and the bytes of the tensors, no code."""

from __future__ import annotations

import safetensors.torch
from torch import Tensor

from emscan.load.header import Loaded, header_length, read_header
from emscan.load.keys import natural
from emscan.load.marks import is_safetensors
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, guarded, printable


class Safetensors(Format):
    """Weights without an architecture."""

    name = "safetensors"
    title = "a safetensors file"
    suffixes = (".safetensors",)

    def matches(self, source: Source) -> bool:
        """Whether the header's length is followed by JSON, with nothing that speaks for a pickle or a text."""
        return is_safetensors(source.head)

    def load(self, source: Source, options: Options) -> Content:
        """Return the tensors by name."""
        header_length(source.head, source.size)  # before all of it is read
        read_header(Loaded(source.data))
        with guarded("its header is malformed"):
            tensors = _tensors(source.data)
        # The library gives no order of its own; layers are numbered, so 10 comes after 2.
        return Content({name: tensors[name].to(options.device) for name in sorted(tensors, key=natural)})


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except KeyError as error:  # the library's table of types
        raise RefusalError(
            f"it has numbers of type {printable(error.args[0], 40)}, which the installed safetensors cannot give torch",
            "a newer safetensors may",
        ) from None
    return tensors
