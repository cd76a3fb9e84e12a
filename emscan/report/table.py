"""The table: one row per layer with a competition or gate, and what was found in words."""

from __future__ import annotations

import html
import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from emscan.report import phrases
from emscan.report.document import Layer, Report

_FINDINGS = 12
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_COLUMNS = ("Layer", "EM structure", "Mechanism", "K", "Dead", "Spread", "Look at first")


def renderable(report: Report, width: int, *, all_layers: bool = False) -> RenderableType:
    """Return the whole report for a console of ``width`` columns."""
    parts: list[RenderableType] = [Text(_heading(report), style="bold", overflow="fold")]
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
    parts += _findings(report)
    parts += [Text(line) for line in phrases.closing(report)]
    return Group(*parts)


def render_text(report: Report, width: int = 100, *, all_layers: bool = False) -> str:
    """Return the report as plain text of at most ``width`` columns."""
    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, force_terminal=False, highlight=False, legacy_windows=False)
    console.print(renderable(report, width, all_layers=all_layers))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def render_html(report: Report) -> str:
    """Return the report as an HTML fragment, every text escaped."""
    rows = [_cells(layer, report) for layer in phrases.shown(report, all_layers=False)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("Layer", "Name", *_COLUMNS[1:]))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    lines = [
        phrases.hidden(report),
        *(f"{f.rule} {f.message}" for f in report.findings[:_FINDINGS]),
        *phrases.closing(report),
    ]
    text = "".join(f"<div>{html.escape(line)}</div>" for line in lines if line)
    return (
        f"<div><strong>{html.escape(_heading(report))}</strong>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{text}</div>"
    )


def _heading(report: Report) -> str:
    model = report.model
    name = model.path or "model"
    trust = ", TRUSTED (code in the file may have run)" if model.trusted else ""
    return f"{name}: {model.format}, {model.parameters:,} parameters{trust}"


def _table(report: Report, rows: list[Layer], width: int) -> Table:
    """Wide: a column each for name and first look. Narrow: both on a second line under the layer, nothing wraps."""
    cells = [_cells(layer, report) for layer in rows]
    wide = width >= 110
    table = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    middle = ("EM", *_COLUMNS[2:5]) if width < 72 else _COLUMNS[1:6]
    taken = sum(max(len(title), *(len(row[i + 2]) for row in cells)) + 2 for i, title in enumerate(middle))
    first = max(len(_COLUMNS[0]), *(len(row[0]) for row in cells))
    room = max(12, width - taken - 2)
    if wide:
        names = min(max(4, *(len(row[1]) for row in cells)), max(12, room - first - 22))
        looks = max(16, room - first - names - 4)
        table.add_column(_COLUMNS[0], max_width=first, overflow="fold")
        table.add_column("Name", no_wrap=True)
    else:
        names, looks = room, room
        table.add_column(
            _COLUMNS[0], width=min(room, max(first, *(len(_under(row, room)) for row in cells))), overflow="fold"
        )
    for i, title in enumerate(middle, 1):
        table.add_column(title, no_wrap=True, justify="right" if i in {3, 4} else "left")
    if wide:
        table.add_column(_COLUMNS[6], max_width=looks, overflow="fold")
    for row, layer in zip(cells, rows, strict=True):
        values = [_styled(i, row[i + 1], layer) for i in range(1, len(middle) + 1)]
        if wide:
            table.add_row(Text(row[0]), Text(_elided(row[1], names), "dim"), *values, Text(row[7]))
        else:
            table.add_row(Text.assemble(row[0], (f"\n{_under(row, room)}", "dim")), *values)
    return table


def _under(row: tuple[str, ...], room: int) -> str:
    """Return the second line of a row: its name and what to look at first, elided to fit."""
    look = f"  {row[7]}" if row[7] else ""
    name = _elided(row[1], max(8, room - 2 - len(look)))
    return f"  {name}{look}"[:room]


def _cells(layer: Layer, report: Report) -> tuple[str, ...]:
    calls = f" (x{layer.calls})" if layer.calls > 1 else ""
    return (
        layer.composition,
        layer.name + calls,
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


def _findings(report: Report) -> list[RenderableType]:
    if not report.findings:
        return []
    lines: list[RenderableType] = []
    for finding in report.findings[:_FINDINGS]:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text(f"{finding.rule} {finding.level}", _STYLES[finding.level]), escape(finding.message))
        lines.append(table)
    more = len(report.findings) - _FINDINGS
    if more > 0:
        lines.append(Text(f"... and {more} more findings (--format json lists all)"))
    return [*lines, Text("")]
