"""A bound on the layers that a configuration can ask for: each takes time and memory, though its weights take none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from emscan.load.source import RefusalError

MOST = 200_000  # modules; those of the largest models with experts of their own are some 100,000


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Raise RefusalError in the body where it makes more than 200,000 modules."""
    original = nn.Module.__init__
    made = 0

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal made
        made += 1
        if made > MOST:
            raise RefusalError(f"its configuration asks for more than {MOST:,} layers", "correct the configuration")
        original(self, *args, **kwargs)

    nn.Module.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]
