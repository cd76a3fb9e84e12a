"""Jobs in processes of their own, so that a crash or a hang costs only its own job."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_MEMORY = 12 * 2**30  # bytes of address space that one process may take: more would end its neighbours
_READY, _BEGUN = "ready", "begun"  # imports are done; the job has called its signal


@dataclass(frozen=True)
class Lost:
    """What is known of a job that never ended; ``begun``: it had called its signal."""

    job: Any
    reason: str
    begun: bool


def _work(pipe: Connection, run: Callable[[Any, Callable[[], None]], Any]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    pipe.send(_READY)
    while (job := pipe.recv()) is not None:
        pipe.send(run(job, lambda: pipe.send(_BEGUN)))


class _Worker:
    """One process; it is started anew after a crash or when it runs out of time."""

    def __init__(self, run: Callable[[Any, Callable[[], None]], Any]) -> None:
        self.pipe, far = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_work, args=(far, run), daemon=True)
        self.process.start()
        far.close()
        self.job: Any = None
        self.since = 0.0
        self.begun = False

    def give(self, job: Any) -> None:
        """Send a job."""
        self.job, self.since, self.begun = job, time.monotonic(), False
        self.pipe.send(job)

    def take(self) -> Any:
        """Return the result, None where the process only signals or has died."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return None
        if result not in (_READY, _BEGUN):
            return result
        self.begun, self.since = result == _BEGUN, time.monotonic()
        return None

    def lost(self, limit: float) -> Lost | None:
        """Return why the job will not end, None while it may."""
        if not self.process.is_alive():
            return Lost(self.job, f"the process died with {self.process.exitcode}", self.begun)
        if time.monotonic() - self.since > limit:
            return Lost(self.job, f"no end after {limit:.0f} s", self.begun)
        return None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def results(
    run: Callable[[Any, Callable[[], None]], Any], jobs: list[Any], workers: int, limit: float
) -> Iterator[Any]:
    """Yield ``run(job, signal)`` of every job as it ends, or a `Lost`.

    ``signal()`` starts the clock anew; ``limit``: seconds that a job may take before and after it.
    """
    waiting = list(reversed(jobs))
    pool = [_Worker(run) for _ in range(min(workers, len(jobs)))]
    for worker in pool:
        worker.give(waiting.pop())
    while pool:
        ready = wait([worker.pipe for worker in pool], timeout=1.0)
        for place, worker in reversed(list(enumerate(pool))):
            result = worker.take() if worker.pipe in ready else None
            if result is None:
                result = worker.lost(limit)
                if result is None:
                    continue
                worker.stop()
                worker = pool[place] = _Worker(run)
            yield result
            if waiting:
                worker.give(waiting.pop())
            else:
                worker.stop()
                del pool[place]
