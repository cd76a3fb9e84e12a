"""The bytes of a file, read once: what is hashed and checked is what is loaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ZIP_MAGIC = b"PK\x03\x04"
_HEAD = 1 << 16


class RefusalError(Exception):
    """Why a file is not loaded: ``reason`` (what and why) and ``hint`` (what to do); `load` adds the path."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class UnsafeError(RefusalError):
    """Loading would run, or might run, code that the file chooses; the user may overrule this with --trust."""


class Source:
    """One file. Its first bytes tell the format; ``data``, all of them, is read once and only when it is asked for.

    ``head``: the first bytes, ``size``: bytes in all, ``names``: the entries of a readable zip archive, None for any
    other file. ``folder``: the folder that the user gave, where the file is what describes it. What is checked and
    loaded is ``data`` alone: a file that changes between the two is refused.
    """

    def __init__(self, path: str, folder: Path | None = None) -> None:
        self.path = path
        self.folder = folder
        with readable():
            file, self.size = open_regular(path)
            with file:
                self._identity = _identity(file)
                self.head = file.read(_HEAD)
                self.names = zip_names(file) if self.head.startswith(ZIP_MAGIC) else None

    @classmethod
    def read(cls, path: str, folder: Path | None = None) -> Source:
        """Open the regular file at ``path``; raises RefusalError where that is not possible."""
        return cls(path, folder)

    @functools.cached_property
    def data(self) -> bytes:
        """The bytes of the file. Raises RefusalError where they do not fit in memory or have changed."""
        if self.size == len(self.head):
            return self.head
        if self.size > free_memory():
            raise RefusalError(f"it has {self.size:,} bytes, more than the memory that is free", "free some memory")
        with readable():
            file, _ = open_regular(self.path)
            with file:
                same = _identity(file) == self._identity
                data = file.read(self.size)
        if not same or len(data) != self.size or not data.startswith(self.head):
            raise RefusalError("it changed while it was read", "try again when nothing writes to it")
        return data

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of ``data``."""
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def last(self) -> bytes:
        """The last byte."""
        if self.size == len(self.head):
            return self.head[-1:]
        with readable():
            file, size = open_regular(self.path)
            with file:
                file.seek(max(0, size - 1))
                return file.read(1)

    @property
    def suffix(self) -> str:
        """The last extension of the name, in lower case."""
        return Path(self.path).suffix.lower()

    def inside(self) -> tuple[str, ...]:
        """Names of the zip entries without the folder that torch puts them all in."""
        return tuple(name.partition("/")[2] for name in self.names or ())


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def free_memory() -> int:
    """Return the bytes of memory that can be had without pushing anything out, as far as the system tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize


def open_regular(path: str) -> tuple[BinaryIO, int]:
    """Open the regular file at ``path`` for reading; returns it and its bytes. Raises RefusalError, or OSError."""
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise RefusalError("it is no regular file", "give the path of a model file")
    return os.fdopen(descriptor, "rb"), status.st_size


@contextmanager
def readable() -> Iterator[None]:
    """Turn what opening and reading a file raises into a RefusalError."""
    try:
        yield
    except FileNotFoundError:
        raise RefusalError("there is no such file", "check the path") from None
    except PermissionError:
        raise RefusalError("permission to read it is denied", "check the rights of the file") from None
    except MemoryError:
        raise RefusalError("it is larger than the memory that is free") from None
    except (OSError, ValueError) as error:
        raise RefusalError(f"it cannot be read ({brief(error)})", "check the path") from None


def zip_names(file: BinaryIO) -> tuple[str, ...] | None:
    """Return the names of the entries where ``file`` is a readable zip archive, else None."""
    try:
        with zipfile.ZipFile(file) as archive:
            return tuple(info.filename for info in archive.infolist())
    except Exception:  # a damaged directory raises half a dozen types
        return None


def printable(text: object, limit: int = 200) -> str:
    """Return ``text`` safe for one line of a terminal: control characters escaped, at most ``limit`` characters."""
    escaped = " ".join(str(text)[: 4 * limit].split()).encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def brief(error: BaseException) -> str:
    """Return type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])}" if lines else type(error).__name__


def listing(names: list[str], shown: int = 3) -> str:
    """Return the first few names and how many more there are."""
    text = ", ".join(printable(name, 80) for name in names[:shown])
    return f"{text} and {len(names) - shown} more" if len(names) > shown else text


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn whatever a parser raises on a malformed file into a RefusalError."""
    try:
        yield
    except RefusalError:
        raise
    except Exception as error:
        raise RefusalError(f"{what} ({brief(error)})", "the file is damaged: copy or save it again") from None
