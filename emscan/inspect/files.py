"""The files of one inspection: each is opened once, read by its headers, and listed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from emscan.inspect.detect import reader_for
from emscan.inspect.document import FileInfo
from emscan.inspect.part import Part
from emscan.inspect.reader import Reader, opened
from emscan.load.source import RefusalError, Source, printable


@dataclass
class Files:
    """``check``: whether values are counted. ``listed``: the files in order; ``read_bytes``: bytes read of them all."""

    check: bool = False
    listed: list[FileInfo] = field(default_factory=list)
    read_bytes: int = 0

    def add(self, info: FileInfo, file: Reader | None = None) -> None:
        """List a file."""
        self.listed.append(info)
        self.read_bytes += file.read_bytes if file is not None else 0

    def whole(self, path: Path, name: str, source: Source | None = None) -> Part:
        """Return what the file at ``path``, the only one, holds. Raises RefusalError."""
        source = source or Source.read(str(path))
        with opened(str(path)) as file:
            part = reader_for(source, file)(file, name)
            if self.check:
                from emscan.inspect.values import count_values

                count_values(file, part.entries)
            self.add(FileInfo(name, file.size, part.format), file)
        return part

    def read(self, path: Path, name: str) -> Part:
        """Return what one of several files holds. Raises RefusalError that names the file."""
        try:
            return self.whole(path, name)
        except RefusalError as error:
            raise type(error)(f"its file {printable(name, 80)} does not load: {error.reason}", error.hint) from None
