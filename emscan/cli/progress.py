"""Progress on stderr, once an audit has taken a second, and only on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_PATIENCE = 1.0  # seconds before progress is shown


def described(done: int, total: int | None, samples: int, seconds: float) -> str:
    """Return rate and remaining time; ``seconds``: how long ``done`` batches of ``samples`` samples took.

    The remaining time is not told where the number of batches is unknown.
    """
    if not done or seconds <= 0:
        return ""
    rate = samples / seconds
    text = f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s"
    if total is None or total <= done:
        return text
    return f"{text}, {_clock((total - done) * seconds / done)} left"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Progress:
    """A bar with batches done and in all, samples per second, and the time that is left.

    The first batch is also the one whose structure is looked at: it counts as done, and is left out of the rate as
    soon as there are others.
    """

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._total: int | None = None
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None  # samples of the first batch, and when it was done
        self._done, self._text = 0, ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            bar, self._bar, self._task = self._bar, None, None
            self._timer = None
        if bar is not None:
            bar.stop()

    def step(self, done: int, total: int | None, samples: int) -> None:
        """Show that ``done`` of ``total`` batches have run, with ``samples`` samples; 0 before the first one."""
        if not sys.stderr.isatty():
            return
        now = time.monotonic()
        if not done:
            self._start, self._total = now, total
            self._timer = threading.Timer(_PATIENCE, self._show)  # what takes long may be the first batch
            self._timer.daemon = True
            self._timer.start()
            return
        if self._first is None:
            self._first = samples, now
        before, since = (self._first[0], self._first[1]) if done > 1 else (0, self._start)
        batches = done - 1 if done > 1 else done
        left = None if total is None else total - (done - batches)
        self._done, self._text = done, described(batches, left, samples - before, now - since)
        with self._lock:
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=done, description="probe", text=self._text)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        # a bar that redirects stdout hands it back as it was here, within the model's code: the report would be lost
        bar = Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
        with self._lock:
            if self._timer is None:  # the audit is over
                return
            doing = "probe" if self._done else "structure"
            self._task = bar.add_task(doing, total=self._total, completed=self._done, text=self._text)
            bar.start()
            self._bar = bar
