"""Mutates small sound files and checks what every loader makes of them.

    python -m tests.hostile.fuzz --cases 20000 --seed 1 --loader module

A case is fine if it loads, or is refused by one of emscan's own errors in one printable line; if it takes less than ten
seconds and less memory than twice its size and 64 MiB; and if no process is started, no connection made and no file
written meanwhile. Cases run in forked children, so that a crash of the process is found like anything else. A case is
made by the seed, the loader and its number alone, the same in every run. Needs Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import pickle
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from emscan.errors import EmscanError
from tests.hostile import corpus, layers
from tests.hostile.corpus import Files

SECONDS = 10
PATIENCE = 60  # seconds for an audit: how long a model takes is the model's affair
SPARE = 64 * 2**20
RUNNING = 512 * 2**20  # for an audit, which runs the model within --max-memory 64M
CEILING = 3 * 2**30  # what a child may have allocated at all, so that a find does not take the machine with it
_BLOCK = 64
_REPORT = 256  # cases after which a campaign prints what it found
_MINIMIZING = 150  # runs to make a find smaller
_FORBIDDEN = frozenset(
    "os.system os.exec os.posix_spawn os.fork os.spawn subprocess.Popen socket.connect os.remove os.rename "
    "os.rmdir os.symlink os.chmod shutil.rmtree".split()
)


@dataclass
class Find:
    """A case that broke a promise: ``what`` says which, ``files`` are its bytes."""

    loader: str
    number: int
    what: str
    files: Files

    def __str__(self) -> str:
        """Return the find with all that is needed to run it again."""
        packed = base64.b64encode(zlib.compress(pickle.dumps(self.files), 9)).decode()
        return f"{self.loader} case {self.number}: {self.what}\n  --replay {self.loader}:{packed}"


# -- what is run -----------------------------------------------------------------------------------------------------


def _load(path: Path) -> None:
    from emscan.load import load

    load(str(path))


def _probe(path: Path) -> None:
    from emscan.probe.files import read

    read(str(path))


def command(*arguments: str) -> None:
    """Run the command line in this process; raises AssertionError where it does not fail, or answer, as promised."""
    import io

    from emscan.cli import main

    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["emscan", *arguments]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = before
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("emscan: note: ")]
    text = "\n".join(lines)
    assert status in (0, 2, 3), f"exit status {status}: {text}"
    assert "internal error" not in text, text
    assert all(line.isprintable() for line in lines), f"a line that steers a terminal: {text!r}"
    if status == 2:
        assert len(lines) == 1, f"not one line: {text}"
        assert lines[0].startswith("emscan: error: "), text
        assert not out.getvalue(), f"something on stdout: {out.getvalue()[:200]!r}"
    else:
        assert out.getvalue(), "no report"


def _audit(path: Path) -> None:
    command("audit", str(path), "--format", "json", "--max-memory", "64M")


def _inspect(path: Path) -> None:
    command("inspect", str(path), "--format", "json")
    command("inspect", str(path), "--check-values", "--all")


RUNS: dict[str, Callable[[Path], None]] = {
    **{name: _probe if name.startswith("probe-") else _load for name in corpus.SEEDS},
    "inspect": _inspect,
    "layers": _audit,
}
COMMANDS = frozenset({"inspect", "layers"})


def _seconds(loader: str) -> int:
    return PATIENCE if loader in COMMANDS else SECONDS


def make(loader: str, seed: int, number: int) -> Files:
    """Return a case."""
    rng = Random(f"{seed}/{loader}/{number}")
    if loader == "layers":
        return {"m.pt": layers.mutant(rng)}
    seeds = _seeds(rng.choice(sorted(corpus.SEEDS)) if loader == "inspect" else loader)
    files, other = dict(rng.choice(seeds)), rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(files))
        mutator = corpus.MUTATORS[name[name.rindex(".") :]]
        files[name] = mutator(files[name], rng.choice(sorted(other.values())), rng)
    return files


_SEEDS: dict[str, list[Files]] = {}


def _seeds(loader: str) -> list[Files]:
    if loader not in _SEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _SEEDS[loader] = corpus.SEEDS[loader]()
    return _SEEDS[loader]


# -- one case --------------------------------------------------------------------------------------------------------


def judge(loader: str, files: Files, folder: Path) -> str | None:
    """Run a case in this process and return which promise it breaks, or None."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = folder if len(files) > 1 else folder / next(iter(files))
    before = _reset_peak()
    start = time.perf_counter()
    broken = None
    try:
        _WATCH.append(None)
        RUNS[loader](path)
    except EmscanError as error:
        broken = _message(str(error).replace(str(folder), ""))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        broken = f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
    finally:
        done = _WATCH.pop()
    grown, limit = _peak() - before, 2 * sum(map(len, files.values())) + (RUNNING if loader in COMMANDS else SPARE)
    if done is not None:
        broken = f"it did {done}"
    elif broken is None and time.perf_counter() - start > _seconds(loader):
        broken = f"it took {time.perf_counter() - start:.0f} s"
    elif broken is None and grown > limit:
        broken = f"memory grew by {grown / 2**20:.0f} MiB"
    for name in files:
        (folder / name).unlink(missing_ok=True)
    return broken


def _message(text: str) -> str | None:
    if not text.isprintable():
        return f"a message that is not one printable line: {text!r}"
    if "MemoryError" in text or "can't allocate memory" in text or "bad_alloc" in text:
        return f"it asked for absurd memory: {text}"
    return None


_WATCH: list[str | None] = []  # what the running case did that it must not


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if _WATCH and (event in _FORBIDDEN or writes) and "/proc/self" not in str(arguments[:1]):
        _WATCH[-1] = f"{event} {arguments!r}"[:200]


def _reset_peak() -> int:
    """Forget the peak of this process's memory and return what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# -- many cases, in children -----------------------------------------------------------------------------------------


def run(loader: str, cases: list[Callable[[], Files]]) -> list[tuple[int, str]]:
    """Run cases in forked children; return number and complaint of those that broke a promise."""
    finds, done = [], 0
    while done < len(cases):
        finished, complaint = _block(loader, cases[done : done + _BLOCK], finds, done)
        done += finished
        if complaint is not None:
            finds.append((done, complaint))
            done += 1
    return finds


def _block(
    loader: str, cases: list[Callable[[], Files]], finds: list[tuple[int, str]], offset: int
) -> tuple[int, str | None]:
    """Run a few cases in one child; return how many it finished, and why it ended before the last, if it did."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has started threads, none of which holds a lock here
        child = os.fork()
    if not child:
        os.close(reading)
        _child(loader, cases, writing)
    os.close(writing)
    finished = 0
    complaint: str | None = None
    with os.fdopen(reading, "rb") as pipe:
        while finished < len(cases):
            ready, _, _ = select.select([pipe], [], [], _seconds(loader) + 5)
            line = pipe.readline() if ready else b""
            if not line:
                complaint = "" if ready else f"it hung for more than {_seconds(loader)} s"
                break
            if line != b"\n":
                finds.append((offset + finished, line.decode().strip()))
            finished += 1
    if complaint is not None and complaint:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if complaint == "":
        complaint = f"it ended the process ({_ending(status)})"
    return finished, complaint


def _ending(status: int) -> str:
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def _child(loader: str, cases: list[Callable[[], Files]], writing: int) -> None:
    """Run the cases and report a line for each; never returns."""
    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = _status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (used + CEILING, used + CEILING))
        sys.addaudithook(_watch)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases:
                broken = judge(loader, case(), Path(folder))
                os.write(writing, (broken or "").replace("\n", " ")[:2000].encode("utf-8", "replace") + b"\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def fuzz(loader: str, count: int, seed: int = 0, first: int = 0, *, minimize: bool = False) -> list[Find]:
    """Run ``count`` cases of a loader and return those that broke a promise."""
    _warm(loader)
    numbers = range(first, first + count)
    found = run(loader, [lambda number=number: make(loader, seed, number) for number in numbers])
    finds = [Find(loader, numbers[index], what, make(loader, seed, numbers[index])) for index, what in found]
    if minimize:
        for find in finds:
            find.files = smaller(loader, find)
    return finds


def _warm(loader: str) -> None:
    """Load sound files once: what is imported and cached on first use is not a file's doing."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        for files in (
            [{"m.pt": corpus.saved(layers.networks()[0])}]
            if loader == "layers"
            else _seeds("module" if loader == "inspect" else loader)
        ):
            judge(loader, files, Path(folder))


def smaller(loader: str, find: Find) -> Files:
    """Return the files with as much cut out as still gives the same complaint."""
    files = dict(find.files)
    kind = find.what.split(":")[0][:30]
    left = _MINIMIZING
    for name in files:
        size = len(files[name]) // 2
        while size and left:
            start = 0
            while start < len(files[name]) and left:
                attempt = {**files, name: files[name][:start] + files[name][start + size :]}
                left -= 1
                complaints = run(loader, [lambda attempt=attempt: attempt])
                if complaints and complaints[0][1].startswith(kind):
                    files = attempt
                else:
                    start += size
            size //= 2
    return files


def replay(text: str) -> str | None:
    """Run one find again, in a child; returns the complaint."""
    loader, _, packed = text.partition(":")
    files = pickle.loads(zlib.decompress(base64.b64decode(packed)))
    _warm(loader)
    found = run(loader, [lambda: files])
    return found[0][1] if found else None


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description="Fuzz emscan's loaders.")
    parser.add_argument("--cases", type=int, default=2000, help="cases for each loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--loader", choices=sorted(RUNS), action="append", help="may be repeated; default: all")
    parser.add_argument("--minimize", action="store_true", help="make finds smaller, which takes a while")
    parser.add_argument("--replay", help="what a find printed after --replay")
    options = parser.parse_args()
    if options.replay:
        print(replay(options.replay) or "fine")  # noqa: T201
        return 0
    finds = []
    for loader in options.loader or sorted(RUNS):
        start = time.perf_counter()
        found: list[Find] = []
        for first in range(options.first, options.first + options.cases, _REPORT):
            count = min(_REPORT, options.first + options.cases - first)
            more = fuzz(loader, count, options.seed, first, minimize=options.minimize)
            for find in more:
                print(find, flush=True)  # noqa: T201
            found += more
        took = time.perf_counter() - start
        print(f"{loader}: {options.cases} cases in {took:.0f} s, {len(found)} finds", flush=True)  # noqa: T201
        finds += found
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
