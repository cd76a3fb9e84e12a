"""The table: one row per layer with a competition or gate, and what was found in words."""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from emscan.report import phrases, weights
from emscan.report.document import Finding, Report
from emscan.report.fold import Line
from emscan.report.notices import Notice, notices
from emscan.report.select import view

_FINDINGS = 12
_KEPT = ((1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 3, 4), (1, 4), (1,))  # what gives way first: spread, mechanism, K, dead
_NUMBERS = frozenset({3, 4})  # set to the right
_MOVED = {3: "K ", 4: "dead "}  # what names a column that lost its title
_GLUE = "\N{NO-BREAK SPACE}"  # keeps a title and its number on one line
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_WIDE = 110  # columns from which name and first look get a column each
_LEAST = 20  # columns of the narrowest terminal
_COLUMNS = ("Layer", "EM structure", "Mechanism", "K", "Dead", "Spread", "Look at first")


def renderable(report: Report, width: int, *, all_layers: bool = False, layers: Sequence[str] = ()) -> RenderableType:
    """Return the whole report for a console of ``width`` columns.

    ``all_layers``: every row, unfolded; ``layers``: globs of the rows to show, unfolded. Raises UsageError for a glob
    that matches no row.
    """
    width = max(width, _LEAST)
    lines = view(report, all_layers=all_layers, layers=layers)
    parts: list[RenderableType] = [_text(_heading(report), "bold")]
    warned = phrases.notice(report)
    if warned:
        parts.append(Text(warned, style="bold yellow"))
    if lines:
        parts.append(_table(report, lines, width))
    if report.weights is not None:
        parts.append(weights.renderable(report.weights, width, everything=all_layers))
    chosen = bool(layers)
    left = [Text(line, style="dim") for line in phrases.left_out(report, lines, all_layers=all_layers, chosen=chosen)]
    found = _findings(notices(report, lines, chosen=chosen), width)
    parts += [*left, *(found or ([Text()] if left else []))]  # the closing lines stand apart
    parts += [_text(line) for line in phrases.closing(report)]
    return Group(*parts)


def render_text(report: Report, width: int = 100, *, all_layers: bool = False, layers: Sequence[str] = ()) -> str:
    """Return the report as plain text of at most ``width`` columns; options and errors as in ``renderable``."""
    out = io.StringIO()
    console = Console(
        file=out, width=max(width, _LEAST), no_color=True, force_terminal=False, highlight=False, legacy_windows=False
    )
    console.print(renderable(report, width, all_layers=all_layers, layers=layers))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def render_html(report: Report) -> str:
    """Return the report as an HTML fragment, every text escaped; folded as the table is."""
    lines = view(report)
    columns = _columns(report)
    found = notices(report, lines)
    head = "".join(
        f"<th>{html.escape(name)}</th>" for name in ("Layer", "Name", *(_COLUMNS[c] for c in columns), _COLUMNS[6])
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(phrases.printable(row[i]))}</td>" for i in (0, 1, *(c + 1 for c in columns), 7))
        + "</tr>"
        for row in _cells(report, lines)
    )
    loose = weights.lines(report.weights) if report.weights is not None else ()
    said = [
        phrases.notice(report),
        *(" ".join(part for part in line if part) for line in loose),
        *phrases.left_out(report, lines),
        *(f"{n.rule} {n.level} {n.text}" for n in found[:_FINDINGS]),
        _rest(found),
        *phrases.closing(report),
    ]
    text = "".join(f"<div>{html.escape(phrases.printable(line))}</div>" for line in said if line)
    return (
        f"<div><strong>{html.escape(phrases.printable(_heading(report)))}</strong>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{text}</div>"
    )


def _heading(report: Report) -> str:
    model = report.model
    name = model.path or "model"
    trust = ", TRUSTED (code in the file may have run)" if model.trusted else ""
    loose = f", {weights.summary(report.weights)}" if report.weights is not None else ""
    return f"{name}: {model.format}, {model.parameters:,} parameters{loose}{trust}"


def _columns(report: Report) -> tuple[int, ...]:
    """Return the columns between name and first look; without weights nothing is counted or measured."""
    return (1, 2, 3) if phrases.structure_only(report) else _KEPT[0]


def _table(report: Report, lines: Sequence[Line], width: int) -> RenderableType:
    """A column each for everything, where there is room for whole names; else two lines a row."""
    cells = _cells(report, lines)
    middle = _columns(report)
    taken = sum(max(len(_COLUMNS[c]), *(len(row[c + 1]) for row in cells)) + 2 for c in middle)
    first = min(max(len(_COLUMNS[0]), *(len(row[0]) for row in cells)), 32)
    names = max(4, *(len(row[1]) for row in cells))
    looks = width - taken - first - names - 6
    if width < _WIDE or looks < min(22, max(len(_COLUMNS[6]), *(len(row[7]) for row in cells))):
        return _stacked(cells, lines, width, middle)
    table = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column(_COLUMNS[0], max_width=first, overflow="fold")
    table.add_column("Name", no_wrap=True)
    for c in middle:
        table.add_column(_COLUMNS[c], no_wrap=True, justify="right" if c in _NUMBERS else "left")
    table.add_column(_COLUMNS[6], max_width=looks, overflow="fold")
    for row, line in zip(cells, lines, strict=True):
        values = [_styled(c, row[c + 1], line) for c in middle]
        table.add_row(_text(row[0]), _text(row[1], "dim"), *values, _text(row[7]))
    return table


def _stacked(cells: list[tuple[str, ...]], lines: Sequence[Line], width: int, middle: tuple[int, ...]) -> Group:
    """Narrow: the name and what to look at first go to a second line, then the columns that do not fit, so no number is cut."""
    titles, first, columns = _fitted(cells, width, middle)
    wide = [max(len(titles[c]), *(len(row[c + 1]) for row in cells)) for c in columns]

    def printed(head: Text, values: list[Text]) -> Text:
        """One line of the table, columns two spaces apart."""
        out = Text(" ") + head + Text(" " * (first - len(head)))
        for c, size, value in zip(columns, wide, values, strict=True):
            pad = " " * (size - len(value))
            out += Text(f"  {pad}") + value if c in _NUMBERS else Text("  ") + value + Text(pad)
        return out

    out = [Text(), printed(Text(titles[0], "bold"), [Text(titles[c], "bold") for c in columns])]
    out.append(Text(f" {'─' * (first + sum(size + 2 for size in wide))}"))
    for row, line in zip(cells, lines, strict=True):
        head, *more = textwrap.wrap(row[0], first, break_on_hyphens=False) or [""]
        out.append(printed(Text(head), [_styled(c, row[c + 1], line) for c in columns]))
        out += [Text(f" {part}") for part in more]
        moved = [f"{_MOVED.get(c, '')}{row[c + 1]}" for c in middle if c not in columns and row[c + 1] != "-"]
        moved = [part.replace(" ", _GLUE) for part in moved]
        out += [Text(part, "dim") for part in _under(row[1], [*moved, row[7]], width)]
    return Group(*out, Text())


def _fitted(
    cells: list[tuple[str, ...]], width: int, middle: tuple[int, ...]
) -> tuple[tuple[str, ...], int, tuple[int, ...]]:
    """Return titles, the width of the first column and the other columns: the first choice that fits."""
    first = max(len(_COLUMNS[0]), *(len(row[0]) for row in cells))
    short = (_COLUMNS[0], "EM", *_COLUMNS[2:])
    kept = tuple(dict.fromkeys(tuple(c for c in columns if c in middle) for columns in _KEPT))
    choices: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = [
        *((first, titles, columns) for titles, columns in ((_COLUMNS, kept[0]), (short, kept[0]), (short, kept[1]))),
        *((least, short, columns) for least in (18, 8) for columns in kept),
    ]
    room = 0
    for least, titles, columns in choices:
        room = width - 1 - sum(max(len(titles[c]), *(len(row[c + 1]) for row in cells)) + 2 for c in columns)
        if room >= min(least, first):
            return titles, min(room, first), columns
    return short, max(1, min(width - 1, first)), ()


def _under(name: str, rest: list[str], width: int) -> Iterator[str]:
    """Yield what stands under a row: the name whole, and the rest beside it where there is room, else below."""
    tail = "".join(f"  {part}" for part in rest if part)
    parts = [name] if 3 + len(name) + len(tail) <= width else _wrapped(name, width - 5)
    lines = [f"   {'  ' if i else ''}{_elided(part, width - (5 if i else 3))}" for i, part in enumerate(parts)]
    if len(lines[-1]) + len(tail) <= width:
        lines[-1] += tail
    else:
        lines += [f"     {part}" for part in textwrap.wrap(tail.strip(), width - 5, break_on_hyphens=False)]
    yield from (line.replace(_GLUE, " ") for line in lines)


def _wrapped(name: str, width: int) -> list[str]:
    """Return a name in lines; those of folded rows break between their ranges, where the room allows it."""
    if len(name) > 4 * width:  # nobody vouches for names
        return [name]
    glued = re.sub(r"(?<= \()[^()]*(?=\))| to ", lambda found: found[0].replace(" ", _GLUE), name)
    for text in (glued, name):
        parts = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        if parts and max(map(len, parts)) <= width:
            return parts
    return [name]


def _cells(report: Report, lines: Sequence[Line]) -> list[tuple[str, ...]]:
    found: dict[int, list[Finding]] = {}
    for finding in report.findings:
        if finding.layer_index is not None:
            found.setdefault(finding.layer_index, []).append(finding)
    return [
        (
            phrases.printable(line.first.composition),
            phrases.printable(line.label) + phrases.calls(line),
            phrases.structure(line.first),
            phrases.mechanism(line.first),
            phrases.count(line.first),
            phrases.dead(line),
            phrases.spread(line),
            phrases.look_first(line, [f for row in line.members for f in found.get(row.index, ())]),
        )
        for line in lines
    ]


def _styled(column: int, cell: str, line: Line) -> Text:
    if column == 1:
        return Text(cell, style="green" if line.first.verdict == "em" else "")
    if column == 4 and any(row.components is not None and row.components.dead for row in line.members):
        return Text(cell, style="bold red")
    return Text(cell)


def _elided(name: str, width: int) -> str:
    """Return a name that fits. Whole segments of its middle go first: both ends tell layers apart, and half an index
    is another index."""
    if len(name) <= width:
        return name
    parts = name.split(".")
    for gone in range(1, len(parts) - 1):
        head = (len(parts) - gone + 1) // 2
        short = ".".join((*parts[:head], "…", *parts[head + gone :]))
        if len(short) <= width:
            return short
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _text(text: str, style: str = "") -> Text:
    """Text for the console: never markup, and nothing in it steers the terminal."""
    return Text(phrases.printable(text), style, overflow="fold")


def _findings(found: list[Notice], width: int) -> list[RenderableType]:
    if not found:
        return []
    lines: list[RenderableType] = []
    for notice in found[:_FINDINGS]:
        if width < 50:  # no room for a column beside the code
            lines.append(_text(f"{notice.rule} {notice.level} {notice.text}"))
            continue
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text(f"{notice.rule} {notice.level}", _STYLES[notice.level]), _text(notice.text))
        lines.append(table)
    rest = _rest(found)
    return [*lines, *([Text(rest)] if rest else []), Text("")]


def _rest(found: list[Notice]) -> str | None:
    """Return the line that counts the findings that the table leaves out."""
    more = sum(notice.count for notice in found[_FINDINGS:])
    return f"... and {more} more finding{'s' if more > 1 else ''} (--format json lists all)" if more > 0 else None
