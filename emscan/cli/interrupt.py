"""Ctrl-C and SIGTERM during a probe: the batch that runs is finished and the rest left, a second one quits at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAIT = b"emscan: interrupted: finishing this batch (again to quit at once)\n"


class QuitError(KeyboardInterrupt):
    """The user does not wait for a report."""


class Interrupts:
    """Turns the first signal into a KeyboardInterrupt between two batches, where the numbers are whole.

    A context manager around the audit; ``hold()`` is what the audit enters for every batch. ``signal``: the last one
    that came, None without any. In a thread other than the main one nothing is changed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let a batch be finished; a signal that came meanwhile is raised after it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signal is not None:
            raise KeyboardInterrupt

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again:
            raise QuitError
        if not self._held:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # print() is not made for signal handlers
            os.write(2, _WAIT)
