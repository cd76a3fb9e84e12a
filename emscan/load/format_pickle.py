"""Any other pickle: it can run code, so it is loaded only with --trust."""

from __future__ import annotations

from emscan.load.calls import HINT
from emscan.load.imports import imports
from emscan.load.marks import is_pickle, may_be_pickle
from emscan.load.registry import Content, Format, Options
from emscan.load.source import Source, UnsafeError, listing
from emscan.load.unsafe import unpickle_unsafely


class Pickle(Format):
    """A pickle that torch.save did not write."""

    name = "pickle"
    either = True
    title = "a pickle"
    suffixes = (".pkl", ".pickle")

    def matches(self, source: Source) -> bool:
        """Whether it starts with a protocol number, or runs to its end as a pickle of protocol 0 or 1."""
        return is_pickle(source.head) or (may_be_pickle(source.head, source.last) and imports(source.data)[1])

    def load(self, source: Source, options: Options) -> Content:
        """Unpickle with ``options.trust`` only."""
        names, _ = imports(source.data)
        what = f"unpickling it would import {listing(names, 8)}" if names else "unpickling can run code"
        error = UnsafeError(f"it is a pickle that torch.save did not write, and {what}", HINT)
        if not options.trust:
            raise error
        return unpickle_unsafely(source, error)
