"""Which rows the table shows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from emscan.errors import UsageError
from emscan.report import fold
from emscan.report.document import Layer, Report

_NEAR = 4  # names that an error lists


def view(report: Report, *, all_layers: bool = False, layers: Sequence[str] = ()) -> list[fold.Line]:
    """Return the lines of the table: rows with a competition or gate, folded where they are many.

    ``all_layers``: every row, unfolded. ``layers``: the rows whose name matches one of these globs, unfolded.
    Raises UsageError for a glob that matches none.
    """
    if layers:
        return [fold.single(row) for row in matching(report, layers)]
    if all_layers:
        return [fold.single(row) for row in report.layers]
    return fold.lines([row for row in report.layers if row.verdict != "none"])


def matching(report: Report, patterns: Sequence[str]) -> list[Layer]:
    """Return the rows whose name is, or as a glob matches, one of the patterns. Raises UsageError for one without match."""
    chosen: set[int] = set()
    for pattern in patterns:
        found = {i for i, row in enumerate(report.layers) if row.name == pattern or fnmatchcase(row.name, pattern)}
        if not found:
            raise UsageError(f"--layer {pattern}: no layer has such a name", _hint(pattern, report))
        chosen |= found
    return [report.layers[i] for i in sorted(chosen)]


def _hint(pattern: str, report: Report) -> str:
    """Return names near a pattern: those that hold it, else those that look like it, else the first ones."""
    names = list(dict.fromkeys(row.name for row in report.layers))
    if not names:
        return "this report has no layers"
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"write '{pattern}.*' for what is below it"
    bare = pattern.strip("*?.")
    near = [name for name in names if bare and bare in name]
    if not near:  # one name of each path: comparing with thousands that differ by index takes long and says no more
        paths = [names[group.members[0]] for group in fold.groups(names, [None] * len(names))]
        near = difflib.get_close_matches(pattern, paths, _NEAR, 0.5)
    more = f" +{len(near or names) - _NEAR}" if len(near or names) > _NEAR else ""
    listed = f"{', '.join((near or names)[:_NEAR])}{more}"
    return f"names near it: {listed}" if near else f"the names are {listed}"
