"""Where the report goes: stdout, which it has to itself, or a file, which is written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from emscan.errors import UsageError

_ASCII = str.maketrans({"─": "-", "…": "~"})  # what the table draws with, where the terminal has no Unicode


def emit(text: str, end: str = "\n") -> None:
    """Print on stdout. A reader that has gone is no failure; raises UsageError where stdout cannot be written."""
    if sys.stdout is None:
        raise UsageError("stdout is closed", "give --output FILE")
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(f"{text}{end}")
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
    except OSError as error:
        _abandon_stdout()
        raise UsageError(f"cannot write to stdout: {error.strerror}", "give --output FILE") from None


def _abandon_stdout() -> None:
    """Keep the interpreter from failing on the same stream again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def kept_stdout() -> Iterator[None]:
    """Send to stderr what foreign code, compiled code too, writes to stdout while the context is open."""
    if sys.stdout is None:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with contextlib.suppress(OSError):  # stderr may be closed
            os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        with contextlib.suppress(OSError, AttributeError, TypeError):  # C's own buffer would come out after the report
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def check_output(path: Path, *sources: str | None, option: str = "--output") -> None:
    """Raise UsageError, before anything runs, where the report cannot be written or would replace a source."""
    if path.is_dir():
        raise UsageError(f"{option} {path}: a folder", "name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: no such folder", "create it first")
    for source in sources:
        with contextlib.suppress(OSError, ValueError):  # a SPEC need not be a file
            if source is not None and path.samefile(source):
                raise UsageError(f"{option} {path} would replace what is audited", "name another file")


def write_file(path: Path, text: str) -> None:
    """Write all or nothing: what was there stays if writing fails. A device or a pipe is written to as it is."""
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path.resolve(), text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}", "choose another --output") from None


def _replace(path: Path, text: str) -> None:
    mask = os.umask(0)
    os.umask(mask)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as out:
        made = Path(out.name)
    try:
        made.write_text(text, encoding="utf-8")
        made.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
