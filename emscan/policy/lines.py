"""Where a key stands in a TOML file: its parser does not say."""

from __future__ import annotations

import re
from collections import Counter

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]")
_KEY = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(?:=|\.)""")


def line_of(text: str, table: str, place: int, key: str | None = None) -> int | None:
    """Return the line of ``key``, or of the header, in the ``place``-th table of that name ("" is the root); from 1.

    None where it is written in a way that a line does not show, as within a table on one line.
    """
    seen: Counter[str] = Counter()
    here = table == "" and place == 0
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header is not None:
            name = ".".join(part.strip().strip("\"'") for part in header[2].split("."))
            here = name == table and seen[name] == place
            seen[name] += 1
            if here and key is None:
                return number
            continue
        found = _KEY.match(line)
        if here and found is not None and key is not None and (found[1] or found[2] or found[3]) == key:
            return number
    return None
