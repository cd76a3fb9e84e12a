"""Reports of a training run's checkpoints, one at a time -> what became of every row. No torch here.

Field names are the contract of schema version 1. Lists over checkpoints have one entry each, in the order of
``checkpoints``; null where a checkpoint could not be audited or does not have the row or the number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from emscan._version import __version__
from emscan.compare.rows import Key, keyed
from emscan.compare.runs import differences, same_probe
from emscan.report.document import Layer, ProbeInfo, Report

SCHEMA_VERSION = 1
COUNTS = ("dead", "rare", "dormant", "starved")
NUMBERS = ("normalized_entropy", "effective_components", "information")

EventName = Literal["died", "revived", "starved", "recovered"]
State = Literal["ok", "inconclusive", "failed"]
_WORDS: dict[str, tuple[EventName, EventName]] = {"dead": ("died", "revived"), "starved": ("starved", "recovered")}


@dataclass
class Totals:
    """Sums over the rows of a checkpoint, and means over those that have the number.

    ``effective_share``: effective components over K. ``information``: in nats.
    """

    components: int = 0
    dead: int = 0
    rare: int = 0
    dormant: int = 0
    starved: int = 0
    normalized_entropy: float | None = None
    effective_share: float | None = None
    information: float | None = None


@dataclass
class Checkpoint:
    """``step``: None where only the order is known. ``label``: what the table calls it. ``why``: of one that failed."""

    path: str
    step: int | None
    label: str
    status: State = "ok"
    why: str = ""
    sha256: str | None = None
    findings: int = 0
    totals: Totals | None = None


@dataclass
class Event:
    """A component that changed between two checkpoints, by their places in ``checkpoints``: ``after`` one, ``before`` other."""

    event: EventName
    component: int
    after: int
    before: int


@dataclass
class LayerSeries:
    """A row over the checkpoints. ``dead_at_first``, ``dead_at_last``: where the row was seen first and last."""

    name: str
    composition: str
    kind: str | None = None
    count: int | None = None
    dead: list[int | None] = field(default_factory=list)
    rare: list[int | None] = field(default_factory=list)
    dormant: list[int | None] = field(default_factory=list)
    starved: list[int | None] = field(default_factory=list)
    normalized_entropy: list[float | None] = field(default_factory=list)
    effective_components: list[float | None] = field(default_factory=list)
    information: list[float | None] = field(default_factory=list)
    dead_at_first: list[int] = field(default_factory=list)
    dead_at_last: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


@dataclass
class Trend:
    """A training run. ``ordered_by``: what told the order. ``same_probe``: whether all ran on the first one's probe."""

    tool: dict[str, str]
    ordered_by: str
    probe: ProbeInfo | None = None
    same_probe: bool = True
    checkpoints: list[Checkpoint] = field(default_factory=list)
    layers: list[LayerSeries] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the trend as JSON-ready data."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


@dataclass
class _Seen:
    """What is kept of a row from one checkpoint to the next: its lists, and the place of that checkpoint."""

    place: int
    count: int
    kind: str
    lists: dict[str, frozenset[int]]


class Series:
    """Takes reports one after the other and keeps of each what a trend says, so that none stays in memory."""

    def __init__(self, ordered_by: str) -> None:
        self.trend = Trend({"name": "emscan", "version": __version__}, ordered_by)
        self._layers: dict[Key, LayerSeries] = {}
        self._seen: dict[Key, _Seen] = {}
        self._first: Report | None = None  # the first report without its rows

    def add(self, report: Report, path: str, step: int | None, label: str) -> None:
        """Take the report of the next checkpoint."""
        self._against_first(report, label)
        place = len(self.trend.checkpoints)
        self.trend.checkpoints.append(
            Checkpoint(
                path,
                step,
                label,
                report.summary.status,
                "",
                report.model.sha256,
                report.summary.findings,
                totals(report),
            )
        )
        rows = keyed(report.layers)
        for key, layer in rows.items():
            self._row(key, place).count = layer.components.count if layer.components is not None else None
            self._events(key, layer, place)
        for key, row in self._layers.items():
            _extend(row, rows.get(key))

    def fail(self, path: str, step: int | None, label: str, why: str) -> None:
        """Take a checkpoint that could not be audited."""
        self.trend.checkpoints.append(Checkpoint(path, step, label, "failed", why))
        for row in self._layers.values():
            _extend(row, None)

    def done(self) -> Trend:
        """Return the trend of what was taken so far."""
        self.trend.layers = list(self._layers.values())
        return self.trend

    def _row(self, key: Key, place: int) -> LayerSeries:
        if key not in self._layers:
            row = LayerSeries(key[0], key[1])
            for name in (*COUNTS, *NUMBERS):
                getattr(row, name).extend([None] * place)
            self._layers[key] = row
        return self._layers[key]

    def _events(self, key: Key, layer: Layer, place: int) -> None:
        """Note which components died or came back since the row was seen last; of a resized row nothing can be told."""
        parts, row = layer.components, self._layers[key]
        if parts is None:
            return
        now = _Seen(place, parts.count, parts.kind, {name: frozenset(getattr(parts, name)) for name in _WORDS})
        before = self._seen.get(key)
        row.kind = parts.kind
        row.dead_at_last = sorted(now.lists["dead"])
        if before is None:
            row.dead_at_first = row.dead_at_last
        elif (before.count, before.kind) == (now.count, now.kind):
            row.events += _crossings(before, now)
        else:
            self._note(
                f"layer {layer.name}: {before.count} -> {now.count} {parts.kind}, so no component is followed there"
            )
        self._seen[key] = now

    def _against_first(self, report: Report, label: str) -> None:
        if self._first is None:
            self._first = dataclasses.replace(report, layers=[], findings=[], weights=None)
            self.trend.probe = report.probe
            return
        self.trend.same_probe &= same_probe(self._first.probe, report.probe)
        for sentence in differences(self._first, dataclasses.replace(report, weights=None), "the first one", label):
            self._note(f"{sentence}; numbers may differ for that reason")

    def _note(self, sentence: str) -> None:
        if sentence not in self.trend.notes:
            self.trend.notes.append(sentence)


def _crossings(before: _Seen, now: _Seen) -> Iterable[Event]:
    for name, (entered, left) in _WORDS.items():
        was, is_ = before.lists[name], now.lists[name]
        yield from (Event(entered, index, before.place, now.place) for index in sorted(is_ - was))
        yield from (Event(left, index, before.place, now.place) for index in sorted(was - is_))


def _extend(row: LayerSeries, layer: Layer | None) -> None:
    """Add a checkpoint's entry to every list of a row."""
    parts = layer.components if layer is not None else None
    spread = layer.responsibility if layer is not None else None
    for name in COUNTS:
        getattr(row, name).append(len(getattr(parts, name)) if parts is not None else None)
    for name in NUMBERS:
        getattr(row, name).append(getattr(spread, name) if spread is not None else None)


def totals(report: Report) -> Totals:
    """Return the sums and means over the rows of a report."""
    parts = [layer.components for layer in report.layers if layer.components is not None]
    spreads = [layer.responsibility for layer in report.layers if layer.responsibility is not None]
    shares = [
        layer.responsibility.effective_components / layer.components.count
        for layer in report.layers
        if layer.responsibility is not None
        and layer.responsibility.effective_components is not None
        and layer.components is not None
        and layer.components.count
    ]
    found = Totals(
        sum(part.count for part in parts),
        normalized_entropy=_mean([spread.normalized_entropy for spread in spreads]),
        effective_share=_mean(shares),
        information=_mean([spread.information for spread in spreads]),
    )
    for name in COUNTS:
        setattr(found, name, sum(len(getattr(part, name)) for part in parts))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def trend(reports: Iterable[Report], ordered_by: str = "the order given") -> Trend:
    """Return the trend of reports that are in order."""
    series = Series(ordered_by)
    for place, report in enumerate(reports):
        path = report.model.path or ""
        series.add(report, path, None, path or str(place))
    return series.done()
