"""The table of weights without an architecture: what their numbers say, and what their shapes could mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emscan.report import phrases
from emscan.report.document import WeightsOnly

_LINES = 12  # of each kind
_INDICES = 6  # of a list of rows


def summary(found: WeightsOnly) -> str:
    """Return how much there is: tensors, bytes, types."""
    if len(found.dtypes) == 1:
        return f"{found.tensors:,} {next(iter(found.dtypes))} tensors, {size(found.bytes)}"
    types = ", ".join(f"{count:,} {name}" for name, count in sorted(found.dtypes.items(), key=lambda one: -one[1]))
    return f"{found.tensors:,} tensors ({types}), {size(found.bytes)}"


def size(count: float) -> str:
    """Return a number of bytes in the largest decimal unit that leaves a whole number in front."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:,.3g} TB"


def lines(found: WeightsOnly, most: int | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield kind, tensor and text of every statement; of each kind no more than ``most``, and how many there are."""
    kinds: tuple[tuple[str, list[tuple[str, str]]], ...] = (
        ("not finite", [(one.name, _bad(one.nan, one.inf)) for one in found.not_finite]),
        ("zero rows", [(one.name, f"{len(one.rows)} of {one.count}: {_some(one.rows)}") for one in found.zero_rows]),
        ("equal rows", [(one.name, _groups(one.groups, one.count)) for one in found.duplicate_rows]),
        ("equal tensors", [(names[0], f"= {', '.join(names[1:])}") for names in found.equal_tensors]),
        ("could be", [(one.name, f"{_shape(one.shape)}: {one.could_be}? {one.why}") for one in found.hints]),
    )
    for kind, said in kinds:
        cut = said[: most if most is not None else len(said)]
        yield from ((kind, name, text) for name, text in cut)
        if len(cut) < len(said):
            yield kind, "", f"... and {len(said) - len(cut)} more tensors (--format json lists all)"


def renderable(found: WeightsOnly, width: int, *, everything: bool) -> RenderableType:
    """Return the statements as a table of ``width`` columns, or as lines where that is too narrow for one."""
    rows = [tuple(map(phrases.printable, row)) for row in lines(found, None if everything else _LINES)]
    if not rows:
        return Text("Every number is finite; no row is zero or equals another; no shape is a router's or a codebook's.")
    if width < 60:
        return Group(*(Text(" ".join(part for part in row if part), overflow="fold") for row in rows), Text())
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold", max_width=width // 3)
    table.add_column(overflow="fold")
    last = ""
    for kind, name, text in rows:
        table.add_row(Text(f" {kind if kind != last else ''}"), Text(name), Text(text))
        last = kind
    return Group(Text(), table, Text())


def _bad(nan: int, inf: int) -> str:
    return ", ".join(f"{count:,} {name}" for count, name in ((nan, "NaN"), (inf, "infinite")) if count)


def _groups(groups: Sequence[Sequence[int]], count: int) -> str:
    shown = "; ".join(" = ".join(map(str, group[:_INDICES])) for group in groups[:_INDICES])
    cut = len(groups) > _INDICES or any(len(group) > _INDICES for group in groups[:_INDICES])
    return f"{sum(map(len, groups))} of {count}: {shown}{', ...' if cut else ''}"


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:_INDICES])) + (f", +{len(rows) - _INDICES} more" if len(rows) > _INDICES else "")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
