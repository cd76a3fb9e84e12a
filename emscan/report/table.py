"""The table: one row per layer with a competition or gate, and what was found in words."""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from emscan.report import phrases
from emscan.report.document import Layer, Report

_FINDINGS = 12
_KEPT = ((1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 3, 4), (1, 4), (1,))  # what gives way first: spread, mechanism, K, dead
_NUMBERS = frozenset({3, 4})  # set to the right
_MOVED = {3: "K ", 4: "dead "}  # what names a column that lost its title
_GLUE = "\N{NO-BREAK SPACE}"  # keeps a title and its number on one line
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_WIDE = 110  # columns from which name and first look get a column each
_LEAST = 20  # columns of the narrowest terminal
_COLUMNS = ("Layer", "EM structure", "Mechanism", "K", "Dead", "Spread", "Look at first")


def renderable(report: Report, width: int, *, all_layers: bool = False) -> RenderableType:
    """Return the whole report for a console of ``width`` columns."""
    width = max(width, _LEAST)
    parts: list[RenderableType] = [_text(_heading(report), "bold")]
    if report.probe.synthetic:
        parts.append(
            Text("SYNTHETIC PROBE: inputs were drawn at random; counts and statistics are indicative.", "bold yellow")
        )
    rows = phrases.shown(report, all_layers)
    if rows:
        parts.append(_table(report, rows, width))
    left = None if all_layers else phrases.hidden(report)
    if left:
        parts.append(Text(left, style="dim"))
    parts += _findings(report, width)
    parts += [_text(line) for line in phrases.closing(report)]
    return Group(*parts)


def render_text(report: Report, width: int = 100, *, all_layers: bool = False) -> str:
    """Return the report as plain text of at most ``width`` columns."""
    out = io.StringIO()
    console = Console(
        file=out, width=max(width, _LEAST), no_color=True, force_terminal=False, highlight=False, legacy_windows=False
    )
    console.print(renderable(report, width, all_layers=all_layers))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def render_html(report: Report) -> str:
    """Return the report as an HTML fragment, every text escaped."""
    rows = [_cells(layer, report) for layer in phrases.shown(report, all_layers=False)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("Layer", "Name", *_COLUMNS[1:]))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(phrases.printable(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    lines = [
        "SYNTHETIC PROBE: counts and statistics are indicative." if report.probe.synthetic else None,
        phrases.hidden(report),
        *(f"{f.rule} {f.level} {f.message}" for f in report.findings[:_FINDINGS]),
        _rest(report),
        *phrases.closing(report),
    ]
    text = "".join(f"<div>{html.escape(phrases.printable(line))}</div>" for line in lines if line)
    return (
        f"<div><strong>{html.escape(phrases.printable(_heading(report)))}</strong>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{text}</div>"
    )


def _heading(report: Report) -> str:
    model = report.model
    name = model.path or "model"
    trust = ", TRUSTED (code in the file may have run)" if model.trusted else ""
    return f"{name}: {model.format}, {model.parameters:,} parameters{trust}"


def _table(report: Report, rows: list[Layer], width: int) -> RenderableType:
    """A column each for everything, where there is room; else two lines a row."""
    cells = [_cells(layer, report) for layer in rows]
    middle = _COLUMNS[1:6]
    taken = sum(max(len(title), *(len(row[i + 2]) for row in cells)) + 2 for i, title in enumerate(middle))
    first = max(len(_COLUMNS[0]), *(len(row[0]) for row in cells))
    room = width - taken - 2
    if width < _WIDE or room < min(first, 32) + 32:
        return _stacked(cells, rows, width)
    first = min(first, room - 32)
    names = min(max(4, *(len(row[1]) for row in cells)), max(12, room - first - 22))
    looks = max(16, room - first - names - 4)
    table = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column(_COLUMNS[0], max_width=first, overflow="fold")
    table.add_column("Name", no_wrap=True)
    for i, title in enumerate(middle, 1):
        table.add_column(title, no_wrap=True, justify="right" if i in _NUMBERS else "left")
    table.add_column(_COLUMNS[6], max_width=looks, overflow="fold")
    for row, layer in zip(cells, rows, strict=True):
        values = [_styled(i, row[i + 1], layer) for i in range(1, len(middle) + 1)]
        table.add_row(_text(row[0]), _text(_elided(row[1], names), "dim"), *values, _text(row[7]))
    return table


def _stacked(cells: list[tuple[str, ...]], rows: list[Layer], width: int) -> Group:
    """Narrow: the name and what to look at first go to a second line, then the columns that do not fit, so no number is cut."""
    titles, first, columns = _fitted(cells, width)
    wide = [max(len(titles[c]), *(len(row[c + 1]) for row in cells)) for c in columns]

    def line(head: Text, values: list[Text]) -> Text:
        """One line of the table, columns two spaces apart."""
        out = Text(" ") + head + Text(" " * (first - len(head)))
        for c, size, value in zip(columns, wide, values, strict=True):
            pad = " " * (size - len(value))
            out += Text(f"  {pad}") + value if c in _NUMBERS else Text("  ") + value + Text(pad)
        return out

    lines = [Text(), line(Text(titles[0], "bold"), [Text(titles[c], "bold") for c in columns])]
    lines.append(Text(f" {'─' * (first + sum(size + 2 for size in wide))}"))
    for row, layer in zip(cells, rows, strict=True):
        head, *more = textwrap.wrap(row[0], first, break_on_hyphens=False) or [""]
        lines.append(line(Text(head), [_styled(c, row[c + 1], layer) for c in columns]))
        lines += [Text(f" {part}") for part in more]
        moved = [f"{_MOVED.get(c, '')}{row[c + 1]}" for c in range(1, 6) if c not in columns and row[c + 1] != "-"]
        moved = [part.replace(" ", _GLUE) for part in moved]
        lines += [Text(part, "dim") for part in _under(row[1], [*moved, row[7]], width)]
    return Group(*lines, Text())


def _fitted(cells: list[tuple[str, ...]], width: int) -> tuple[tuple[str, ...], int, tuple[int, ...]]:
    """Return titles, the width of the first column and the other columns: the first choice that fits."""
    first = max(len(_COLUMNS[0]), *(len(row[0]) for row in cells))
    short = (_COLUMNS[0], "EM", *_COLUMNS[2:])
    choices: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = [
        *((first, titles, columns) for titles, columns in ((_COLUMNS, _KEPT[0]), (short, _KEPT[0]), (short, _KEPT[1]))),
        *((least, short, columns) for least in (18, 8) for columns in _KEPT),
    ]
    room = 0
    for least, titles, columns in choices:
        room = width - 1 - sum(max(len(titles[c]), *(len(row[c + 1]) for row in cells)) + 2 for c in columns)
        if room >= min(least, first):
            return titles, min(room, first), columns
    return short, max(1, min(width - 1, first)), ()


def _under(name: str, rest: list[str], width: int) -> Iterator[str]:
    """Yield what stands under a row: one line where the name can be elided to fit, else the name and the rest below it."""
    tail = "".join(f"  {part}" for part in rest if part)
    lines = textwrap.wrap(tail.strip(), width - 5, break_on_hyphens=False)
    space = width - 3 - len(tail)
    if space >= min(len(name), 16):
        yield f"   {_elided(name, space)}{tail.replace(_GLUE, ' ')}"
        return
    yield f"   {_elided(name, width - 3)}"
    yield from (f"     {part.replace(_GLUE, ' ')}" for part in lines)


def _cells(layer: Layer, report: Report) -> tuple[str, ...]:
    calls = f" (x{layer.calls})" if layer.calls > 1 else ""
    return (
        phrases.printable(layer.composition),
        phrases.printable(layer.name) + calls,
        phrases.structure(layer),
        phrases.mechanism(layer),
        phrases.count(layer),
        phrases.dead(layer),
        phrases.spread(layer),
        phrases.look_first(layer, report),
    )


def _styled(column: int, cell: str, layer: Layer) -> Text:
    if column == 1:
        return Text(cell, style="green" if layer.verdict == "em" else "")
    if column == 4 and layer.components is not None and layer.components.dead:
        return Text(cell, style="bold red")
    return Text(cell)


def _elided(name: str, width: int) -> str:
    """Return a name that fits: its middle goes first, since both ends tell layers apart."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _text(text: str, style: str = "") -> Text:
    """Text for the console: never markup, and nothing in it steers the terminal."""
    return Text(phrases.printable(text), style, overflow="fold")


def _findings(report: Report, width: int) -> list[RenderableType]:
    if not report.findings:
        return []
    lines: list[RenderableType] = []
    for finding in report.findings[:_FINDINGS]:
        if width < 50:  # no room for a column beside the code
            lines.append(_text(f"{finding.rule} {finding.level} {finding.message}"))
            continue
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text(f"{finding.rule} {finding.level}", _STYLES[finding.level]), _text(finding.message))
        lines.append(table)
    rest = _rest(report)
    return [*lines, *([Text(rest)] if rest else []), Text("")]


def _rest(report: Report) -> str | None:
    """Return the line that counts the findings that the table leaves out."""
    more = len(report.findings) - _FINDINGS
    return f"... and {more} more finding{'s' if more > 1 else ''} (--format json lists all)" if more > 0 else None
