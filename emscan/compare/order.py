"""Checkpoints in the order of training: by what their names, their files or the clock say."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emscan.compare.expand import Candidate
from emscan.errors import EmscanError

_STEP = re.compile(
    r"(?<![a-z])(?:global_?step|step|steps|iter|iters|iteration|it|checkpoint)[=_\- ]?(\d+)", re.IGNORECASE
)
_EPOCH = re.compile(r"(?<![a-z0-9])(?:epochs?|ep|e)[=_\- ]?(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_STORED = {"step": ("global_step", "step", "iteration"), "epoch": ("epoch",)}
_STATE = "trainer_state.json"
_LARGEST = 1 << 24  # bytes of a trainer's state that are read

Note = Callable[[str], None]
Rank = tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """A checkpoint in its place; ``step`` is None where only the clock tells."""

    candidate: Candidate
    step: int | None
    label: str


def ordered(candidates: Sequence[Candidate], note: Note) -> tuple[list[Placed], str]:
    """Return the checkpoints in order, and what tells it: "step in the names", "modification time", ...

    Where names have no number the step that the file stores counts, then its modification time. ``note`` is told what
    went another way than the rest, and which have the same step.
    """
    names = _names(candidates)
    unit, ranks = _from_names(names)
    how = f"{unit} in the names"
    missing = [place for place, rank in enumerate(ranks) if rank is None]
    key = _stored_key(candidates, ranks, unit) if missing else unit
    for place in missing:
        ranks[place] = _stored(candidates[place], key)
        if ranks[place] is not None and len(missing) < len(ranks):
            note(f"{names[place]}: {key} {_label(ranks[place])}, from the file")
    if len(missing) == len(ranks):
        how = f"{key} stored in the files"
    if all(rank is None for rank in ranks):
        how = "modification time"
    return _sorted(candidates, names, ranks, note, key or "step"), how


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Return the parts of the paths that differ, without the suffixes of files."""
    parts = [Path(os.path.abspath(one.name)).parts for one in candidates]  # noqa: PTH100 - a link keeps its name
    shared = 0
    if len(set(parts)) > 1:
        while len({path[shared] if shared < len(path) else None for path in parts}) == 1:
            shared += 1
    return [_bare(Path(*path[min(shared, len(path) - 1) :])) for path in parts]


def _bare(path: Path) -> str:
    """Return a path without the suffix of a file; ".5" of v1.5 is none."""
    return (path.with_suffix("") if path.suffix[1:2].isalpha() else path).as_posix()


def _from_names(names: Sequence[str]) -> tuple[str, list[Rank | None]]:
    """Return what the numbers in the names count, and those numbers."""
    for unit, pattern in (("step", _STEP), ("epoch", _EPOCH)):
        found = [pattern.findall(name) for name in names]
        if any(found):
            ranks: list[Rank | None] = [(int(hits[-1]),) if hits else None for hits in found]
            return unit, ranks
    numbers = [[int(part) for part in _NUMBER.findall(name)] for name in names]
    if len({_NUMBER.sub("#", name) for name in names}) == 1 and numbers[0]:
        varying = [place for place, values in enumerate(zip(*numbers, strict=True)) if len(set(values)) > 1]
        alone = [place for place in varying if len({row[place] for row in numbers}) == len(numbers)]
        wanted = alone[:1] or varying
        return "number", [tuple(row[place] for place in wanted) if wanted else None for row in numbers]
    return "number", [(row[-1],) if row else None for row in numbers]


def _stored_key(candidates: Sequence[Candidate], ranks: Sequence[Rank | None], unit: str) -> str | None:
    """Return which of step and epoch the numbers in the names are, None where that cannot be told."""
    if unit != "number":
        return unit
    sample = next((place for place, rank in enumerate(ranks) if rank is not None), None)
    if sample is None:
        keys = [key for key in _STORED if all(_stored(one, key) is not None for one in candidates)]
        return keys[0] if keys else None
    return next((key for key in _STORED if _stored(candidates[sample], key) == ranks[sample]), None)


def _stored(candidate: Candidate, key: str | None) -> Rank | None:
    """Return the step or epoch that a checkpoint's header or trainer state holds; its tensors are not read."""
    if key is None or candidate.report:
        return None
    path = Path(candidate.path)
    found = _state(path / _STATE) if path.is_dir() else _header(path)
    for name in _STORED[key]:
        value = found.get(name)
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and value >= 0:
            return (value,)
    return None


def _state(path: Path) -> dict[str, object]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _header(path: Path) -> dict[str, object]:
    from emscan.inspect import inspect

    try:
        return inspect(str(path)).metadata
    except EmscanError:  # the audit says what is wrong with it
        return {}


def _sorted(
    candidates: Sequence[Candidate], names: Sequence[str], ranks: list[Rank | None], note: Note, key: str
) -> list[Placed]:  # fmt: skip
    times = [_time(one) for one in candidates]
    known = sorted(
        (p for p, rank in enumerate(ranks) if rank is not None), key=lambda p: (ranks[p] or (), times[p], names[p])
    )
    order = list(known)
    for place in sorted((p for p, rank in enumerate(ranks) if rank is None), key=lambda p: (times[p], names[p])):
        if known:
            note(f"{names[place]}: no {key} in its name or its file, so it is placed by modification time")
        after = [at for at, other in enumerate(order) if times[other] <= times[place]]
        order.insert(after[-1] + 1 if after else 0, place)
    same = Counter(rank for rank in ranks if rank is not None)
    for rank, count in sorted(same.items()):
        if count > 1:
            alike = [names[p] for p in known if ranks[p] == rank]
            note(f"{key} {_label(rank)} is there {count} times ({', '.join(alike)}): ordered by modification time")
    return [Placed(candidates[p], _step(ranks[p]), _label(ranks[p]) or names[p]) for p in order]


def _step(rank: Rank | None) -> int | None:
    return rank[0] if rank is not None and len(rank) == 1 else None


def _label(rank: Rank | None) -> str:
    return "-".join(map(str, rank)) if rank is not None else ""


def _time(candidate: Candidate) -> float:
    """Return when a checkpoint was written: of a folder, its newest file."""
    path = Path(candidate.path)
    try:
        inside = [entry.stat().st_mtime for entry in path.iterdir()] if path.is_dir() else []
        return max(inside, default=path.stat().st_mtime)
    except OSError:
        return 0.0
