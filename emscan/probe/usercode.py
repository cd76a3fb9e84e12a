"""Probes that are the user's own code: `package.module:callable` or `path/to/file.py:callable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from emscan.errors import ProbeError
from emscan.load.unsafe import foreign_code
from emscan.usercode import Role, call
from emscan.usercode import find as find_target

PROBE = Role("--probe", "the probe's", ProbeError, ProbeError)


def guarded_iterator(values: Any, what: str) -> Iterator[Any]:
    """Yield from the user's iterable; what it prints goes to stderr, what it raises becomes a ProbeError."""
    end = object()
    try:
        with foreign_code():
            iterator = iter(values)
    except Exception as error:
        raise PROBE.error(error, f"iterating over {what}") from error
    while True:
        try:
            with foreign_code():
                value = next(iterator, end)
        except Exception as error:
            raise PROBE.error(error, f"iterating over {what}") from error
        if value is end:
            return
        yield value


def find(spec: str) -> Callable[[], Any]:
    """Return a function that gives the batches which ``spec`` names, afresh at every call.

    Raises ProbeError where the target does not exist or its own code raises.
    """
    value = find_target(spec, PROBE)
    if not callable(value) or isinstance(value, torch.Tensor):
        return lambda: value
    return lambda: call(value, spec, PROBE)
