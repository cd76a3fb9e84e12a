"""Names that differ only by index: "model.layers.7.mlp.fc1" is the path model.layers.#.mlp.fc1 at the point (7,)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

# What counts as an index, from strict to loose: a whole segment, one set off by "_" (expert_3), any trailing digits
# (denselayer3). A leading zero is part of the name, and a number too long for an index is none.
_INDEX = tuple(re.compile(stem + r"(0|[1-9][0-9]{0,8})", re.DOTALL) for stem in ("()", "(|.*_)", "(|.*?[^0-9])"))
LEVELS = len(_INDEX)
_LISTED = 4  # that many indices without a pattern are listed

Point = tuple[int, ...]
Box = tuple[Sequence[int], ...]  # the sorted indices per axis; every combination of them belongs to it


@dataclass(frozen=True)
class Segment:
    """One dot-separated part of a path: fixed text, or a stem that an index follows."""

    text: str
    index: bool


Path = tuple[Segment, ...]


def parse(name: str, level: int) -> tuple[Path, Point]:
    """Return the path of a name and its indices; ``level`` says how loosely an index is recognized."""
    path: list[Segment] = []
    point: list[int] = []
    for part in name.split("."):
        found = _INDEX[level].fullmatch(part)
        path.append(Segment(found[1], True) if found else Segment(part, False))
        if found:
            point.append(int(found[2]))
    return tuple(path), tuple(point)


def boxes(points: Collection[Point]) -> list[Box]:
    """Split a set of points into products of index sets: one if it is one, else by the values of the first axis."""
    hull = around(points)
    if len(points) == prod(map(len, hull)):
        return [hull]
    rest: dict[int, set[Point]] = {}
    for first, *others in points:
        rest.setdefault(first, set()).add(tuple(others))
    alike: dict[frozenset[Point], list[int]] = {}
    for first in sorted(rest):
        alike.setdefault(frozenset(rest[first]), []).append(first)
    return [(firsts, *box) for others, firsts in alike.items() for box in boxes(others)]


def around(points: Collection[Point]) -> Box:
    """Return the smallest product of index sets that holds the points."""
    return tuple(sorted(set(axis)) for axis in zip(*points, strict=True))


def label(path: Path, box: Box) -> str:
    """Return the name of all members: "model.layers.0 to layers.39 .mlp.fc1"; a space ends a range."""
    out, axes = "", iter(box)
    ranged = False
    for place, segment in enumerate(path):
        values = next(axes) if segment.index else ()
        lead = f"{path[place - 1].text}." if _numbers(path, place) and len(values) > 1 else segment.text
        out += (" ." if ranged else ".") if place else ""
        out += f"{segment.text}{span(values, lead)}" if values else segment.text
        ranged = len(values) > 1
    return out


def tag(path: Path, box: Box, point: Point) -> str:
    """Return what tells one member from the others: "layers.7", or "layers.7 experts.3"."""
    parts: list[str] = []
    axes = iter(zip(box, point, strict=True))
    for place, segment in enumerate(path):
        values, value = next(axes) if segment.index else ((), 0)
        if len(values) < 2:
            continue
        if place and path[place - 1].index and parts:
            parts[-1] += f".{segment.text}{value}"
        elif _numbers(path, place):
            parts.append(f"{path[place - 1].text}.{value}")
        else:
            parts.append(f"{segment.text}{value}" if segment.text else f"layer {value}")
    return " ".join(parts)


def _numbers(path: Path, place: int) -> bool:
    """Whether a segment is a bare number under a word, which then names what is counted."""
    return place > 0 and not path[place].text and not path[place - 1].index


def span(values: Sequence[int], lead: str = "") -> str:
    """Return sorted indices in few words; ``lead`` stands before the last one: "0 to layers.60 (every 2nd)"."""
    first, last, count = values[0], values[-1], len(values)
    if count == 1:
        return str(first)
    step = _step(values)
    if count > 2 and step == 1:
        return f"{first} to {lead}{last}"
    if count > 3 and step:
        return f"{first} to {lead}{last} (every {_ordinal(step)})"
    total = last - first + 1
    if total < 2 * count:
        holes = sorted(set(range(first, last)) - set(values))
        if count > _LISTED and (len(holes) <= _LISTED or _step(holes)):
            return f"{first} to {lead}{last} (all but {span(holes).replace(' (', ', ').rstrip(')')})"
    if count <= _LISTED:
        return ", ".join(map(str, values))
    return f"{first} to {lead}{last} ({count} of {total})"


def _step(values: Sequence[int]) -> int:
    """Return the distance of neighbours where it is the same everywhere, else 0."""
    step = values[1] - values[0] if len(values) > 1 else 0
    return step if all(b - a == step for a, b in pairwise(values)) else 0


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
