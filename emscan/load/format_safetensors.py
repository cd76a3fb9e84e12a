"""Files of safetensors: a JSON header and the bytes of the tensors, no code."""

from __future__ import annotations

import safetensors.torch

from emscan.load.calls import DAMAGED
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, guarded


class Safetensors(Format):
    """Weights without an architecture."""

    name = "safetensors"
    title = "a safetensors file"
    suffixes = (".safetensors",)

    def matches(self, source: Source) -> bool:
        """Whether the header's length is followed by JSON, with nothing that speaks for a pickle or a text."""
        return is_safetensors(source.data)

    def load(self, source: Source, options: Options) -> Content:
        """Return the tensors by name."""
        length = int.from_bytes(source.data[:8], "little")
        if length > len(source.data) - 8:
            raise RefusalError(f"its header claims {length:,} bytes, more than the file has", DAMAGED)
        with guarded("its header is malformed"):
            tensors = safetensors.torch.load(source.data)
        # The library gives no order of its own; layers are numbered, so 10 comes after 2.
        return Content({name: tensors[name].to(options.device) for name in sorted(tensors, key=_natural)})


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


def is_safetensors(data: bytes) -> bool:
    """Whether 8 bytes that are no text and no start of a pickle come before an opening brace."""
    size = data[:8]
    binary = any(byte < 9 or byte > 126 for byte in size)
    return data[8:9] == b"{" and binary and (size[0] != 0x80 or size[5:] == bytes(3))
