"""A trend for people and spreadsheets: the table with sparklines, and CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from emscan.compare import words
from emscan.compare.changes import moved
from emscan.compare.series import COUNTS, NUMBERS, Checkpoint, EventName, LayerSeries, Trend
from emscan.report.phrases import printable

_T = TypeVar("_T")
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_ROWS = 20  # rows, and
_STEPS = 30  # checkpoints of the table without --all
_SPARK = 32  # characters of a sparkline
_EVENTS = 8  # lines of what died in a row, and so on
_LEAST = 40
_CHANGE = 0.01  # a number of a row that never moves by more than this share does not change
_TITLES = {
    "dead": "dead", "rare": "rare", "dormant": "dormant", "starved": "starved", "normalized_entropy": "entropy",
    "effective_share": "effective", "effective_components": "effective", "information": "information",
}  # fmt: skip
_LEGEND = {
    "normalized_entropy": "entropy: mean normalized entropy over rows",
    "effective_share": "effective: effective components over K, mean over rows",
    "information": "information: nats, mean over rows",
}
_EVENT_WORDS: dict[EventName, str] = {
    "died": "died", "revived": "revived", "starved": "became starved", "recovered": "no longer starved"
}  # fmt: skip
COLUMNS = (
    "checkpoint", "step", "path", "status", "layer", "composition", "kind", "count", *COUNTS, "normalized_entropy",
    "effective_components", "effective_share", "information", "died", "revived",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a table is drawn: its width in columns, whether all rows are shown, and with which characters."""

    width: int = 80
    everything: bool = False
    blocks: str = BLOCKS


def sparkline(values: Sequence[float | None], blocks: str = BLOCKS) -> str:
    """Return one character per value, from the least to the greatest; a blank where there is none."""
    found = [value for value in values if value is not None]
    low, high = (min(found), max(found)) if found else (0.0, 0.0)
    steps = len(blocks) - 1
    scale = steps / (high - low) if high > low else 0.0
    return "".join(" " if value is None else blocks[round((value - low) * scale)] for value in values)


def render_text(trend: Trend, look: Look) -> str:
    """Return the trend as plain text, in the width of ``look`` but for names."""
    width = max(look.width, _LEAST)
    lines = _heading(trend, width)
    done = [one for one in trend.checkpoints if one.totals is not None]
    if done:
        lines += ["", *_table(trend, done, look), "", *_totals(done, look)]
    changing = [row for row in trend.layers if look.everything or _changes(row)]
    shown, left = _chosen(changing, look.everything)
    for row in shown:
        lines += ["", *_row(trend, row, look, width)]
    lines += _unshown(trend, changing, left)
    return "\n".join(printable(line) for line in lines)


def _heading(trend: Trend, width: int) -> list[str]:
    count = len(trend.checkpoints)
    lines = _wrapped(f"{count} checkpoints, ordered by {trend.ordered_by}", width)
    if trend.probe is not None:
        same = "" if trend.same_probe else "; NOT the same for all"
        lines += _wrapped(f"probe: {words.probe(trend.probe)}{same}", width, "  ")
        if trend.probe.synthetic:
            lines += _wrapped(
                "The inputs are not data: counts are indicative; give real samples with --probe.", width, "  "
            )
    for note in trend.notes:
        lines += _wrapped(f"note: {note}", width, "  ")
    for one in trend.checkpoints:
        if one.status != "ok":
            why = one.why.removeprefix(f"cannot load {one.path}: ")
            lines += _wrapped(f"{one.label} {one.status}{f': {why}' if why else ''}", width, "  ")
    return lines


def _unit(trend: Trend) -> str:
    """Return what labels count, where the names or the files say it."""
    first = trend.ordered_by.split(" ")[0]
    return first if first in {"step", "epoch"} else "checkpoint"


def _columns(done: Sequence[Checkpoint]) -> list[str]:
    """Return the numbers to show: always the dead, others where there are any."""
    names = (*COUNTS, "normalized_entropy", "effective_share", "information")
    return [name for name in names if name == "dead" or any(getattr(one.totals, name) for one in done)]


def _table(trend: Trend, done: Sequence[Checkpoint], look: Look) -> Iterator[str]:
    columns = _columns(done)
    shown = done if look.everything else _picked(done, _STEPS)
    head = [_unit(trend), *(_TITLES[name] for name in columns)]
    cells = [[_short(one.label), *(_cell(getattr(one.totals, name)) for name in columns)] for one in shown]
    sizes = [max(len(row[c]) for row in (head, *cells)) for c in range(len(head))]
    for row in (head, *cells):
        yield "  ".join([row[0].ljust(sizes[0]), *(v.rjust(s) for v, s in zip(row[1:], sizes[1:], strict=True))])
    if len(shown) < len(done):
        yield f"{len(shown)} of {len(done)} checkpoints shown (--all)"
    legend = [_LEGEND[name] for name in columns if name in _LEGEND]
    if legend:
        yield from _wrapped(f"({'; '.join(legend)})", max(look.width, _LEAST))


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"~{label[-23:]}"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _totals(done: Sequence[Checkpoint], look: Look) -> Iterator[str]:
    lines: list[tuple[str, Sequence[float | None]]] = [
        (_TITLES[name], [getattr(one.totals, name) for one in done]) for name in _columns(done)
    ]
    yield from _sparks([line for line in lines if len({*line[1]}) > 1], look, "")


def _sparks(lines: Sequence[tuple[str, Sequence[float | None]]], look: Look, indent: str) -> Iterator[str]:
    """Yield titles, sparklines, and the first and last number, with the extremes where they lie between."""
    title = max((len(name) for name, _ in lines), default=0)
    for name, values in lines:
        picked = _picked(values, max(8, min(_SPARK, look.width - title - 36)))
        found = [value for value in values if value is not None]
        said = words.pair(found[0], found[-1])
        ends = (found[0], found[-1])
        if max(found) > max(ends):
            said += f", most {words.one(max(found))}"
        if min(found) < min(ends):
            said += f", least {words.one(min(found))}"
        yield f"{indent}{name.ljust(title)}  {sparkline(picked, look.blocks)}  {said}"


def _picked(values: Sequence[_T], most: int) -> list[_T]:
    """Return values evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _changes(row: LayerSeries) -> bool:
    return bool(row.events) or bool(_moving(row))


def _moving(row: LayerSeries) -> list[str]:
    """Return the lists and numbers of a row that change over the checkpoints."""
    names = [name for name in COUNTS if len({*getattr(row, name)} - {None}) > 1]
    for name in NUMBERS:
        found = [value for value in getattr(row, name) if value is not None]
        if found and moved(min(found), max(found), _CHANGE):
            names.append(name)
    return names


def _chosen(rows: Sequence[LayerSeries], everything: bool) -> tuple[list[LayerSeries], int]:
    """Return the rows to show in their order, and how many are left out: those without events first."""
    if everything or len(rows) <= _ROWS:
        return list(rows), 0
    kept = {id(row) for row in sorted(rows, key=lambda row: -len(row.events))[:_ROWS]}
    return [row for row in rows if id(row) in kept], len(rows) - _ROWS


def _row(trend: Trend, row: LayerSeries, look: Look, width: int) -> Iterator[str]:
    count = f", {row.count} {row.kind}" if row.count is not None else ""
    yield from _wrapped(f"{row.name}  {row.composition}{count}", width, "  ")
    if row.dead_at_first:
        first = next(place for place, dead in enumerate(row.dead) if dead is not None)
        yield from _wrapped(f"  already dead at {_at(trend, first)}: {words.ranges(row.dead_at_first)}", width, "    ")
    yield from _sparks([(_TITLES[name], getattr(row, name)) for name in _moving(row)], look, "  ")
    lines = _events(trend, row)
    most = len(lines) if look.everything else _EVENTS
    for line in lines[:most]:
        yield from _wrapped(f"  {line}", width, "    ")
    if len(lines) > most:
        yield f"  ... and {len(lines) - most} more changes (--all)"


def _at(trend: Trend, place: int) -> str:
    return f"{_unit(trend)} {trend.checkpoints[place].label}"


def _events(trend: Trend, row: LayerSeries) -> list[str]:
    """Return a line for each pair of checkpoints between which components of the row changed."""
    found: dict[tuple[int, int], dict[EventName, list[int]]] = {}
    for event in row.events:
        found.setdefault((event.after, event.before), {}).setdefault(event.event, []).append(event.component)
    return [
        f"{_at(trend, after)} -> {trend.checkpoints[before].label}: "
        + "; ".join(f"{_EVENT_WORDS[event]} {words.ranges(indices)}" for event, indices in groups.items())
        for (after, before), groups in found.items()
    ]


def _unshown(trend: Trend, changing: Sequence[LayerSeries], left: int) -> Iterator[str]:
    still = len(trend.layers) - len(changing)
    said = [f"{left} more rows change"] if left else []
    said += [f"{still} row{'s do' if still > 1 else ' does'} not change"] if still else []
    if said:
        yield ""
        yield f"{'; '.join(said)} (--all shows {'them' if still + left > 1 else 'it'})"


def _wrapped(line: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]  # fmt: skip


def render_csv(trend: Trend) -> str:
    """Return a line per checkpoint, with sums and no layer, and per checkpoint and row (RFC 4180).

    ``died`` and ``revived``: indices, a blank apart, since the checkpoint before in which the row was seen.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for place, one in enumerate(trend.checkpoints):
        head = [_safe(one.label), one.step, _safe(one.path), one.status]
        sums = one.totals
        if sums is None:
            writer.writerow([*head, *[""] * (len(COLUMNS) - len(head))])
            continue
        counts = [getattr(sums, name) for name in COUNTS]
        numbers = [sums.normalized_entropy, None, sums.effective_share, sums.information]
        writer.writerow([*head, "", "", "", sums.components, *counts, *numbers, "", ""])
        for row in trend.layers:
            if row.dead[place] is not None or row.normalized_entropy[place] is not None:
                writer.writerow([*head, *_csv_row(row, place)])
    return out.getvalue().removesuffix("\r\n")


def _csv_row(row: LayerSeries, place: int) -> list[object]:
    effective = row.effective_components[place]
    share = effective / row.count if effective is not None and row.count else None
    crossed = [
        " ".join(str(event.component) for event in row.events if event.before == place and event.event == name)
        for name in ("died", "revived")
    ]
    return [
        _safe(row.name), _safe(row.composition), row.kind, row.count, *(getattr(row, name)[place] for name in COUNTS),
        row.normalized_entropy[place], effective, share, row.information[place], *crossed,
    ]  # fmt: skip


def _safe(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text


RENDERERS: dict[str, Callable[[Trend, Look], str]] = {"table": render_text, "csv": lambda trend, _: render_csv(trend)}
