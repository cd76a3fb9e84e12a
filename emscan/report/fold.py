"""Lines of the table: rows that differ only by an index in their name, and agree in what they are, share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

from emscan.report import indices
from emscan.report.document import Layer

MANY = 20  # a table of at most that many rows is shown as it is
_PIECES = 6  # an irregular group falls into at most that many lines; else one line says how many of the range it holds


@dataclass(frozen=True)
class Line:
    """One line: a row, or several, in the order of the table. ``tags`` tell the members apart: "layers.7"."""

    members: tuple[Layer, ...]
    label: str
    tags: tuple[str, ...] = ("",)

    @property
    def first(self) -> Layer:
        """The row that stands for what all members agree in."""
        return self.members[0]

    @property
    def folded(self) -> bool:
        """Whether the line stands for several rows."""
        return len(self.members) > 1


def single(row: Layer) -> Line:
    """Return the line of one row."""
    return Line((row,), row.name)


def lines(rows: Sequence[Layer]) -> list[Line]:
    """Return the lines of a table: a row each if they are few, else folded."""
    return fold(rows) if len(rows) > MANY else [single(row) for row in rows]


def fold(rows: Sequence[Layer]) -> list[Line]:
    """Return every row in exactly one line; lines are ordered by their first member.

    Indices are recognized as strictly as a table of ``MANY`` lines allows: "expert_3" counts as one only if it must.
    """
    names = [row.name for row in rows]
    kinds = [_kind(row) for row in rows]
    tries: list[list[Group]] = []
    for level in range(indices.LEVELS):
        tries.append(groups(names, kinds, level))
        if len(tries[-1]) <= MANY:
            break
    return [Line(tuple(rows[m] for m in g.members), g.label, g.tags) for g in min(tries, key=len)]


def _kind(row: Layer) -> Hashable:
    """What the members of a line agree in."""
    found = row.alternatives
    count = (found.kind, found.count) if found is not None else None
    return row.composition, row.verdict, row.mechanism, count, row.leaky, row.statistic


@dataclass(frozen=True)
class Group:
    """Positions of names that differ only by index, in ascending order, and what to call them."""

    members: tuple[int, ...]
    label: str
    tags: tuple[str, ...] = ("",)


def groups(names: Sequence[str], kinds: Sequence[Hashable], level: int = 0) -> list[Group]:
    """Return positions grouped by path and kind, ordered by the first member. A name that comes twice is in two groups."""
    seen: Counter[tuple[str, Hashable]] = Counter()
    found: dict[tuple[indices.Path, Hashable, int], dict[indices.Point, int]] = {}
    for place, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        path, point = indices.parse(name, level)
        seen[name, kind] += 1
        found.setdefault((path, kind, seen[name, kind]), {})[point] = place
    out = [group for (path, _, _), points in found.items() for group in _split(path, points, names)]
    return sorted(out, key=lambda group: group.members)


def _split(path: indices.Path, points: dict[indices.Point, int], names: Sequence[str]) -> list[Group]:
    """One group per product of index sets; where that takes too many, one that owns up to its gaps."""
    pieces = indices.boxes(points)
    whole = len(pieces) <= _PIECES
    if not whole:
        pieces = [indices.around(points)]
    out = []
    for box in pieces:
        inside = [set(axis) for axis in box]
        chosen = [p for p in points if all(value in axis for value, axis in zip(p, inside, strict=True))]
        chosen.sort(key=points.__getitem__)
        members = tuple(points[p] for p in chosen)
        if len(members) == 1:
            out.append(Group(members, names[members[0]]))
            continue
        gaps = "" if whole else f" ({len(members)} of {prod(map(len, box))})"
        out.append(Group(members, indices.label(path, box) + gaps, tuple(indices.tag(path, box, p) for p in chosen)))
    return out
