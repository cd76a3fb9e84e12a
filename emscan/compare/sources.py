"""Reports and checkpoints where a command takes either."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from emscan.report.document import Report
from emscan.report.read import Note, read_reports

_HEAD = 1 << 16


def is_report(path: str) -> bool:
    """Whether a path is to be read as a saved report: stdin, or a file of JSON text that is no index of shards."""
    if path == "-":
        return True
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):  # loading says why
        return False
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith((b"{", b"[")) or b"\0" in head:  # a safetensors header has its length before it
        return False
    return b'"schema_version"' in head or (Path(path).suffix == ".json" and b'"weight_map"' not in head)


@lru_cache(maxsize=1)
def reports_of(path: str, note: Note | None = None) -> tuple[Report, ...]:
    """Return the reports of a file; the last file's are kept, so that a series in one file is read once.

    ``note``: as in `read_reports`.
    """
    return tuple(read_reports(path, note))
