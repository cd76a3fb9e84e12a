"""Loading that may run code from the file: only ever called with the user's --trust, and always noted."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from emscan.load.registry import Content, Options
from emscan.load.source import RefusalError, Source, UnsafeError, brief


@contextlib.contextmanager
def foreign_code() -> Iterator[None]:
    """Keep what foreign code prints off stdout, which is the report's alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def load_unsafely(loader: Callable[[], Any]) -> Any:
    """Run a loader of a trusted file; raises RefusalError with what it raised."""
    try:
        with foreign_code(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loader()
    except (ImportError, AttributeError) as error:
        hint = "make its classes importable: run where its package is installed, or use a state_dict with --model"
        raise RefusalError(f"it needs code that is not here ({brief(error)})", hint) from None
    except (Exception, SystemExit) as error:
        raise RefusalError(f"loading it failed ({brief(error)})", "the file is damaged or of another torch") from None


def torch_load_unsafely(source: Source, options: Options, reason: UnsafeError) -> Content:
    """Load a torch checkpoint that is not safe, because the user trusts it."""
    value = load_unsafely(
        lambda: torch.load(io.BytesIO(source.data), map_location=options.device, weights_only=False, mmap=False)
    )
    return Content(value, trusted=True, notes=[trusted_note(reason)])


def unpickle_unsafely(source: Source, reason: UnsafeError) -> Content:
    """Load any pickle, because the user trusts it."""
    value = load_unsafely(lambda: pickle.loads(source.data))
    return Content(value, trusted=True, notes=[trusted_note(reason)])


def trusted_note(reason: UnsafeError) -> str:
    """Return the note that a trusted load leaves in the report."""
    return f"loaded with --trust although {reason.reason}"
