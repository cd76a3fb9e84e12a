"""A file that is read by offset: never whole, and never more at once than a header may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from emscan.load.source import RefusalError, open_regular, readable

MOST = 100_000_000  # bytes of one header; safetensors allows as many
_DAMAGED = "the file is damaged: copy or save it again"


class Reader:
    """A regular file of ``size`` bytes. ``read_bytes`` counts what was read of it.

    It is file enough for zipfile: the directory of an archive is a header, too.
    """

    def __init__(self, path: str, file: BinaryIO, size: int, base: int = 0, parent: Reader | None = None) -> None:
        self.path = path
        self.size = size
        self.read_bytes = 0
        self._file = file
        self._position = 0
        self._base = base
        self._parent = parent

    def at(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``, fewer only where the file ends; raises RefusalError above MOST."""
        offset = max(0, offset)
        count = max(0, min(count, self.size - offset))
        if count > MOST:
            raise RefusalError(f"its headers take {count:,} bytes, more than {MOST:,}", _DAMAGED)
        with readable():
            self._file.seek(self._base + offset)
            data = self._file.read(count)
        self.note(len(data))
        return data

    def note(self, count: int) -> None:
        """Count bytes that were read, of the file around this one, too."""
        self.read_bytes += count
        if self._parent is not None:
            self._parent.note(count)

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes, as files do."""
        data = self.at(self._position, self.size if count is None or count < 0 else count)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, as files do."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError("negative seek")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seekable(self) -> bool:
        """Say so to zipfile."""
        return True

    def window(self, start: int, size: int) -> Reader:
        """Return a file within this one. Raises RefusalError where it does not fit."""
        if start < 0 or size < 0 or start + size > self.size:
            raise RefusalError("a file inside it reaches beyond its end", _DAMAGED)
        return Reader(self.path, self._file, size, self._base + start, self)


@contextmanager
def opened(path: str) -> Iterator[Reader]:
    """Open the regular file at ``path``; raises RefusalError where that is not possible."""
    with readable():
        file, size = open_regular(path)
    with file:
        yield Reader(path, file, size)
