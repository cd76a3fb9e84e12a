"""An inspection for people: the same look as the audit's table."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from emscan.inspect import words
from emscan.inspect.document import Inspection, TensorInfo
from emscan.report.phrases import printable

_TENSORS = 20  # rows of the table without --all, and so on
_FILES = 8
_MODULES = 8
_IMPORTS = 12
_VALUE = 200  # characters of a value of the metadata
_NAME = 16  # columns of the longest usual name
_LEAST = 20


def renderable(found: Inspection, width: int, *, everything: bool = False) -> RenderableType:
    """Return the whole inspection for a console of ``width`` columns; ``everything``: no list is cut."""
    width = max(width, _LEAST)
    parts: list[RenderableType] = [_text(_heading(found), "bold")]
    if found.status == "not supported":
        parts.append(_text("not supported", "bold yellow"))
    facts = [*_metadata(found.metadata), *_modules(found, everything), *_dtypes(found)]
    parts += _facts(facts, width)
    parts += _files(found, everything)
    parts += _tensors(found, width, everything)
    parts += _pickle(found, width, everything)
    parts += _facts([("note", note) for note in found.notes], width)
    parts += [Text(), *_audit(found)]
    return Group(*parts)


def render_text(found: Inspection, width: int = 100, *, everything: bool = False) -> str:
    """Return the inspection as plain text of at most ``width`` columns."""
    out = io.StringIO()
    console = Console(
        file=out, width=max(width, _LEAST), no_color=True, force_terminal=False, highlight=False, legacy_windows=False
    )
    console.print(renderable(found, width, everything=everything))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _heading(found: Inspection) -> str:
    totals = found.totals
    counts = [words.size(found.bytes)]
    if totals.tensors:
        counts.append(words.counted(totals.tensors, "tensor"))
    if totals.parameters:
        counts.append(words.counted(totals.parameters, "parameter"))
    if len(found.files) > 1:
        counts.append(words.counted(len(found.files), "file"))
    return f"{found.path}: {found.title} ({found.format}), {', '.join(counts)}"


def _text(text: str, style: str = "") -> Text:
    """Text for the console: never markup, and nothing in it steers the terminal."""
    return Text(printable(text), style, overflow="fold")


def _facts(facts: Iterable[tuple[str, str]], width: int) -> list[RenderableType]:
    """Return names and what there is to say of each, wrapped beside the name where there is room."""
    if width < 50:
        return [_text(f"{name}: {value}") for name, value in facts]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=_NAME)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(_text(name, "dim"), _text(value))
    return [table] if table.rows else []


def _metadata(metadata: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in metadata.items():
        if name == "hyper_parameters" and isinstance(value, dict):
            value = list(value)
        plain = isinstance(value, list) and all(isinstance(item, str) for item in value)
        text = ", ".join(value) if plain else value if isinstance(value, str) else json.dumps(value, default=str)
        yield name.replace("_", " "), text if len(text) <= _VALUE else f"{text[:_VALUE]}... ({len(text):,} characters)"


def _modules(found: Inspection, everything: bool) -> Iterable[tuple[str, str]]:
    """Count the modules by class, or with --all name each."""
    if not found.modules:
        return
    if everything:
        for module in found.modules:
            yield "module", f"{module.name or '(the model)'}: {module.class_}"
        return
    kinds = Counter(module.class_.rpartition(".")[2] for module in found.modules).most_common()
    listed = ", ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in kinds[:_MODULES])
    yield "modules", f"{len(found.modules):,}: {listed}{_rest(len(kinds) - _MODULES, 'class', 'classes')}"


def _rest(more: int, noun: str, nouns: str) -> str:
    return f" and {more:,} more {noun if more == 1 else nouns}" if more > 0 else ""


def _dtypes(found: Inspection) -> Iterable[tuple[str, str]]:
    dtypes = found.totals.dtypes
    if dtypes:
        shown = sorted(dtypes.items(), key=lambda item: -item[1])
        yield "dtypes", ", ".join(f"{name} ({count:,})" if len(dtypes) > 1 else name for name, count in shown)


def _files(found: Inspection, everything: bool) -> list[RenderableType]:
    if len(found.files) < 2:
        return []
    shown = found.files if everything else found.files[:_FILES]
    table = _plain_table(("File", "left"), ("Format", "left"), ("Size", "right"))
    for file in shown:
        table.add_row(
            _text(file.name), _text(file.format), words.size(file.bytes), style="" if file.bytes is not None else "red"
        )
    more = len(found.files) - len(shown)
    return [table, *([_text(_cut(more, "file"), "dim")] if more else [])]


def _plain_table(*columns: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _cut(more: int, noun: str) -> str:
    return f"... and {more:,} more {noun}{'' if more == 1 else 's'} (--all shows them)"


def _tensors(found: Inspection, width: int, everything: bool) -> list[RenderableType]:
    """The tensors; those with NaN or Inf come first where the list is cut."""
    if not found.tensors:
        return []
    checked = any(tensor.nan is not None for tensor in found.tensors)
    ordered = found.tensors if everything else sorted(found.tensors, key=lambda one: not (one.nan or one.inf))
    shown = ordered if everything else ordered[:_TENSORS]
    columns = [("Tensor", "left"), ("Dtype", "left"), ("Shape", "left"), ("Size", "right")]
    columns += [("NaN", "right"), ("Inf", "right")] if checked else []
    if width < 60:
        return [*(_text(f"{one.name}: {', '.join(_cells(one, checked)[1:])}") for one in shown), *_more(found, shown)]
    table = _plain_table(*columns)
    for column in table.columns[1:]:
        column.no_wrap = True
    for tensor in shown:
        name, *cells = _cells(tensor, checked)
        table.add_row(_text(name), *map(_text, cells), style="bold red" if tensor.nan or tensor.inf else "")
    return [table, *_more(found, shown), *_values(found, checked)]


def _cells(tensor: TensorInfo, checked: bool) -> list[str]:
    values = [f"{count:,}" if count is not None else "-" for count in (tensor.nan, tensor.inf)] if checked else []
    return [
        tensor.name or "(unnamed)",
        tensor.dtype or "?",
        words.shape(tensor.shape),
        words.size(tensor.bytes),
        *values,
    ]


def _more(found: Inspection, shown: Sequence[TensorInfo]) -> list[RenderableType]:
    more = len(found.tensors) - len(shown)
    return [_text(_cut(more, "tensor"), "dim")] if more else []


def _values(found: Inspection, checked: bool) -> list[RenderableType]:
    """Say what the check of the values found, of all tensors."""
    if not checked:
        return []
    bad = [tensor for tensor in found.tensors if tensor.nan or tensor.inf]
    unread = sum(tensor.nan is None for tensor in found.tensors)
    text = f"{words.counted(len(bad), 'tensor')} with NaN or Inf" if bad else "No NaN, no Inf"
    return [_text(f"{text}{f'; {unread:,} not checked' if unread else ''}.", "bold red" if bad else "")]


def _pickle(found: Inspection, width: int, everything: bool) -> list[RenderableType]:
    if found.pickle is None:
        return []
    refused = found.pickle.refused
    names = {one.name for one in refused}
    safe = [name for name in found.pickle.imports if name not in names]
    shown = safe if everything else safe[:_IMPORTS]
    listed = ", ".join(shown) + _rest(len(safe) - len(shown), "name", "names")
    counted = f"{len(found.pickle.imports):,}: {listed or 'all refused'}" if found.pickle.imports else "none"
    shown_refused = refused if everything else refused[:_IMPORTS]
    parts = _facts([("imports", counted), *(("refused", f"{one.name}: {one.reason}") for one in shown_refused)], width)
    if len(refused) > len(shown_refused):
        parts.append(_text(_cut(len(refused) - len(shown_refused), "refused name"), "dim"))
    return parts


def _audit(found: Inspection) -> list[RenderableType]:
    audit = found.audit
    if not audit.supported:
        return [_text(f"Cannot be audited: {audit.reason}", "yellow")]
    lead = "To audit it, only if you trust where it comes from" if audit.needs_trust else "To audit it"
    parts: list[RenderableType] = [_text(f"{lead}: {audit.command}", "bold")]
    return [*parts, _text(f"{audit.reason[:1].upper()}{audit.reason[1:]}.")] if audit.reason else parts
