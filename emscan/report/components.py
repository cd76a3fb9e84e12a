"""CSV of components: a row for every unit, class, expert or code, for spreadsheets and data frames (RFC 4180)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from emscan.report.base import Document, Setting
from emscan.report.document import Components, Layer, Report
from emscan.report.phrases import printable

_STATES = ("dead", "rare", "dormant", "linear", "starved", "frozen", "provably_dead")
_NUMBERS = ("on_rate", "load", "soft_load", "variance", "mass", "gradient")
COLUMNS = (
    "model", "layer_index", "layer", "module", "composition", "verdict", "mechanism", "kind", "component", "state",
    "stuck_at", *_NUMBERS,
)  # fmt: skip
_FORMULA = tuple("=+-@＝＋－＠")  # what makes a spreadsheet run a cell; the wide forms do in some


class ComponentsFormat(Document):
    """``state``: the lists that the component is in, a space apart; empty where there is nothing to say."""

    name = "csv"
    end = "\r\n"

    def document(self, reports: Sequence[Report], setting: Setting) -> str:
        """Return the table with its head; numbers as in the JSON report."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(COLUMNS)
        for report in reports:
            for layer in report.layers:
                if layer.components is not None:
                    writer.writerows(_rows(report, layer, layer.components))
        return out.getvalue().removesuffix("\r\n")


def _rows(report: Report, layer: Layer, parts: Components) -> Iterator[list[str | int | float]]:
    """Yield the rows of a layer. Where it has numbers, of every component; else of those that are in a list."""
    states: dict[int, list[str]] = {}
    for state in _STATES:
        for index in getattr(parts, state):
            states.setdefault(index, []).append(state)
    numbers: list[list[float | None]] = [getattr(parts, name) or [] for name in _NUMBERS]
    stuck = dict(zip(parts.dead, parts.stuck_at or [], strict=False))
    every = set(range(max(map(len, numbers)))) | set(states)
    texts = (layer.name, layer.module or "", layer.composition, layer.verdict, layer.mechanism, parts.kind)
    name, *others = [_cell(text) for text in texts]
    head: list[str | int | float] = [_cell(report.model.path or ""), layer.index, name, *others]
    for index in sorted(every):
        values = (stuck.get(index), *(some[index] if index < len(some) else None for some in numbers))
        yield [*head, index, " ".join(states.get(index, ())), *("" if value is None else value for value in values)]


def _cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
