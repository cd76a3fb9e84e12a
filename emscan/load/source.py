"""The bytes of a file, read once: what is hashed and checked is what is loaded."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ZIP_MAGIC = b"PK\x03\x04"


class RefusalError(Exception):
    """Why a file is not loaded: ``reason`` (what and why) and ``hint`` (what to do); `load` adds the path."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class UnsafeError(RefusalError):
    """Loading would run, or might run, code that the file chooses; the user may overrule this with --trust."""


@dataclass(frozen=True)
class Source:
    """One file in memory. ``names``: the entries of a readable zip archive, None for any other file. ``folder``: the
    folder that the user gave, where the file is what describes it."""

    path: str
    data: bytes
    sha256: str
    names: tuple[str, ...] | None
    folder: Path | None = None

    @classmethod
    def read(cls, path: str) -> Source:
        """Read the regular file at ``path`` whole; raises RefusalError where that is not possible."""
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise RefusalError("it is no regular file", "give the path of a model file")
                data = file.read(status.st_size)
        except FileNotFoundError:
            raise RefusalError("there is no such file", "check the path") from None
        except PermissionError:
            raise RefusalError("permission to read it is denied", "check the rights of the file") from None
        except MemoryError:
            raise RefusalError("it is larger than the memory that is free") from None
        except (OSError, ValueError) as error:
            raise RefusalError(f"it cannot be read ({brief(error)})", "check the path") from None
        return cls(path, data, hashlib.sha256(data).hexdigest(), zip_names(data))

    @property
    def suffix(self) -> str:
        """The last extension of the name, in lower case."""
        return Path(self.path).suffix.lower()

    def inside(self) -> tuple[str, ...]:
        """Names of the zip entries without the folder that torch puts them all in."""
        return tuple(name.partition("/")[2] for name in self.names or ())


def zip_names(data: bytes) -> tuple[str, ...] | None:
    """Return the names of the entries where ``data`` is a readable zip archive, else None."""
    if not data.startswith(ZIP_MAGIC):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
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
