"""A saved file -> a model: a module, or weights without an architecture, and where they came from.

A checkpoint is untrusted input. Without ``trust`` nothing in it executes: pickles are first run on symbols
(`pickles`), then loaded by torch's restricted unpickler with an allowlist of torch's own layers (`allowlist`), and
what comes out is checked once more (`graph`). The bytes that are checked are the bytes that are loaded (`source`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emscan.load.loading import LoadedModel, load

__all__ = ["LoadedModel", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: the checks of a file's headers need no torch, and inspecting uses them alone."""
    if name in __all__:
        from emscan.load import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
