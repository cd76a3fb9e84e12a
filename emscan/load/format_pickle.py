"""Any other pickle: it can run code, so it is loaded only with --trust."""

from __future__ import annotations

from emscan.load.calls import HINT
from emscan.load.format_legacy import LEGACY_MAGIC
from emscan.load.format_safetensors import is_safetensors
from emscan.load.imports import imports
from emscan.load.registry import Content, Format, Options
from emscan.load.source import Source, UnsafeError, listing
from emscan.load.unsafe import unpickle_unsafely

_FIRST_OPCODES = b"(cl]}dIFLNSUVXKMJ)i"  # what a pickle without a protocol number may start with


class Pickle(Format):
    """A pickle that torch.save did not write."""

    name = "pickle"
    either = True
    title = "a pickle"
    suffixes = (".pkl", ".pickle")

    def matches(self, source: Source) -> bool:
        """Whether it starts with a protocol number, or runs to its end as a pickle of protocol 0 or 1."""
        data = source.data
        if data[:1] == b"\x80":
            return len(data) > 2 and data[1] <= 5 and not data[2:].startswith(LEGACY_MAGIC) and not is_safetensors(data)
        return data[:1] in {bytes([code]) for code in _FIRST_OPCODES} and data[-1:] == b"." and imports(data)[1]

    def load(self, source: Source, options: Options) -> Content:
        """Unpickle with ``options.trust`` only."""
        names, _ = imports(source.data)
        what = f"unpickling it would import {listing(names, 8)}" if names else "unpickling can run code"
        error = UnsafeError(f"it is a pickle that torch.save did not write, and {what}", HINT)
        if not options.trust:
            raise error
        return unpickle_unsafely(source, error)
