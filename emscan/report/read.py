"""A saved report back into its data classes, as it was written. No torch here.

The file is nobody's word: every value is checked against the type and the bounds that the schema gives it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from emscan.errors import ReportError
from emscan.report.document import SCHEMA_VERSION, Report
from emscan.report.schema import BOUNDS

MOST_BYTES = 1 << 30  # a report of a 400-billion-parameter model is far below that
_WRITE = "write one with `emscan audit MODEL --format json --output FILE`"
_DEEP = 64  # levels of what is free-form; a report's own are fewer
_PLAIN: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
}

Note = Callable[[str], None]


class _WrongError(Exception):
    """A value that no report has, and where it stands."""


def read_report(path: str | Path, note: Note | None = None) -> Report:
    """Return the report that a file holds; exactly one, see ``read_reports``."""
    found = read_reports(path, note)
    if len(found) != 1:
        raise ReportError(f"{path} holds {len(found)} reports, one is needed", "give a file with a single report")
    return found[0]


def read_reports(path: str | Path, note: Note | None = None) -> list[Report]:
    """Return the reports of a file of `--format json`: one document or an array of them; "-" is stdin.

    ``note`` is told, in one sentence per file, what was ignored because a newer emscan wrote it. Raises ReportError,
    whose message names the file and the place in it, for one that cannot be read or holds something else.
    """
    name = "stdin" if str(path) == "-" else str(path)
    return parse_reports(_bytes(path, name), name, note)


def parse_reports(data: bytes, name: str, note: Note | None = None) -> list[Report]:
    """Return the reports in the bytes of a JSON document; ``name`` says in errors what was read."""
    document = _json(data, name)
    extra: Counter[str] = Counter()
    several = isinstance(document, list)
    try:
        reports = [
            _report(one, f"[{i}]" if several else "", extra)
            for i, one in enumerate(document if several else [document])
        ]
    except _WrongError as error:
        raise ReportError(f"{name} is no report: {error}", _WRITE) from None
    if extra and note is not None:
        note(f"{name}: ignored what this version of emscan does not know: {', '.join(sorted(extra)[:5])}")
    return reports


def _bytes(path: str | Path, name: str) -> bytes:
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            if Path(path).is_dir():
                raise ReportError(f"{name} is a folder, no report", _WRITE)
            if Path(path).exists() and not (Path(path).is_file() or Path(path).is_fifo()):
                raise ReportError(f"{name} is no file", _WRITE)
            with Path(path).open("rb") as file:
                data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ReportError(f"cannot read {name}: {why}", _WRITE) from None
    if len(data) > MOST_BYTES:
        raise ReportError(f"{name} is larger than {MOST_BYTES >> 20:,} MiB: no report is", _WRITE)
    return data


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data, parse_constant=_constant)
    except UnicodeDecodeError:
        raise ReportError(f"{name} is no report: it is no text", _WRITE) from None
    except RecursionError:
        raise ReportError(f"{name} is no report: it is nested too deep", _WRITE) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if data.strip() else "it is empty"
        raise ReportError(f"{name} is no report: it is no JSON ({where})", _WRITE) from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise ReportError(f"{name} is no report: {' '.join(str(error).split())[:80]}", _WRITE) from None


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text} for a number")


def _report(document: Any, where: str, extra: Counter[str]) -> Report:
    if not isinstance(document, dict) or "schema_version" not in document:
        raise _WrongError(f"{where or 'it'} has no schema_version")
    version = document.pop("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise _WrongError(f"schema_version is {_said(version)}, this emscan reads {SCHEMA_VERSION}")
    found: Report = _object(Report, document, where, extra)
    return found


def _object(cls: type, value: Any, where: str, extra: Counter[str]) -> Any:
    """Return an instance of a data class; a field that has a default may be missing, an unknown one is noted."""
    if type(value) is not dict:
        raise _WrongError(f"{where or 'it'} is {_said(value)}, not an object")
    fields = _fields(cls)
    made = {}
    for name, item in value.items():
        place = f"{where}.{name}" if where else name
        if name in fields:
            made[name] = fields[name].read(item, place, extra)
        else:
            extra[re.sub(r"\[\d+\]", "[]", place)[:80]] += 1
    missing = [name for name, field in fields.items() if field.required and name not in made]
    if missing:
        raise _WrongError(f"{where + ' ' if where else ''}has no {missing[0]}")
    return cls(**made)


@dataclasses.dataclass(frozen=True)
class _Field:
    """How a field is read."""

    kind: Any
    bounds: Mapping[str, Any]
    required: bool

    def read(self, value: Any, where: str, extra: Counter[str]) -> Any:
        return _value(self.kind, value, where, extra, self.bounds)


@cache
def _fields(cls: type) -> dict[str, _Field]:
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        f.name: _Field(
            hints[f.name], BOUNDS.get((cls.__name__, f.name), {}), f.default is missing and f.default_factory is missing
        )
        for f in dataclasses.fields(cls)
    }


def _value(kind: Any, value: Any, where: str, extra: Counter[str], bounds: Mapping[str, Any]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        if value is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, where, extra, bounds)
    if kind is Any:
        return _free(value, where, 0)
    if origin is typing.Literal:
        if type(value) is not str or value not in args:
            raise _WrongError(f"{where} is {_said(value)}, none of {', '.join(map(str, args))}")
        return value
    if origin is list:
        if type(value) is not list:
            raise _WrongError(f"{where} is {_said(value)}, not a list")
        return [_value(args[0], item, f"{where}[{i}]", extra, bounds) for i, item in enumerate(value)]
    if origin is dict:
        if type(value) is not dict:
            raise _WrongError(f"{where} is {_said(value)}, not an object")
        for name in bounds.get("required", ()):
            if name not in value:
                raise _WrongError(f"{where} has no {name}")
        return {name: _value(args[1], item, f"{where}.{name}", extra, {}) for name, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _object(kind, value, where, extra)
    return _scalar(kind, value, where, bounds)


def _scalar(kind: Any, value: Any, where: str, bounds: Mapping[str, Any]) -> Any:
    """Return text, a truth value or a number; a whole number is a number, nothing else is converted."""
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _WrongError(f"{where} is {_said(value)}, not {_PLAIN[kind]}")
    if "minimum" in bounds and value < bounds["minimum"]:
        raise _WrongError(f"{where} is {_said(value)}, below {bounds['minimum']}")
    if "maximum" in bounds and value > bounds["maximum"]:
        raise _WrongError(f"{where} is {_said(value)}, above {bounds['maximum']}")
    if "pattern" in bounds and not re.fullmatch(bounds["pattern"].rstrip("$"), value):
        raise _WrongError(f"{where} is {_said(value)}, not as {bounds['pattern']}")
    return value


def _free(value: Any, where: str, depth: int) -> Any:
    """Return what a report takes over from elsewhere (settings of the environment, arguments), within reason."""
    if depth > _DEEP:
        raise _WrongError(f"{where[:60]} is nested too deep")
    if isinstance(value, dict):
        return {name: _free(item, f"{where}.{name}", depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_free(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if type(value) is float and not math.isfinite(value):
        raise _WrongError(f"{where} is {_said(value)}, not a number")
    return value


def _said(value: Any) -> str:
    """Return a value in few words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number too large"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a number too large"
    text = json.dumps(value)
    return f"{text[:40]}..." if len(text) > 43 else text
