"""A policy from a file, the environment and options: every key and value is checked, and the place of a wrong one named."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emscan.errors import UsageError
from emscan.policy.document import Ignore, Override, Part, Policy, Value
from emscan.policy.find import OWN, SECTION, SHARED, find, parse, section, shown
from emscan.policy.keys import FILES, KEYS, LIMIT, RULES_OPTION, RUN, THRESHOLD, Key, named
from emscan.policy.lines import line_of

_TABLES = {"layer": "pattern", "checkpoint": "path"}  # tables that there can be several of, and what they are for
_PATHS = ("probe", "model", "baseline")  # what names a file relative to the policy's folder
_OTHER_VARIABLES = frozenset({"EMSCAN_DEBUG", "EMSCAN_CONFIG"})


def read_policy(
    config: Path | None = None,
    *,
    search: bool = True,
    environment: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    start: Path | None = None,
) -> Policy:
    """Return the policy: options over environment over the file.

    ``config`` names the file; without it the nearest one from ``start`` (the working directory) upward is taken, if
    ``search``. ``options``: key -> value as text; None is not given. Raises UsageError, one line that names file and
    line, for an unknown key or a wrong value.
    """
    source = config if config is not None else find(start or Path.cwd()) if search else None
    parts: list[Part] = []
    notes: list[str] = []
    if source is not None:
        source = source.absolute()
        parts += _of_file(source, named_by_user=config is not None)
        notes += _beside(source)
    parts.append(Part(_of_environment(environment or {})))
    given = {name: value for name, value in (options or {}).items() if value is not None and value != []}
    parts.append(Part({name: _option(KEYS[name], value) for name, value in given.items()}))
    return Policy(source, tuple(parts), tuple(notes))


def _beside(source: Path) -> list[str]:
    shared = source.parent / SHARED
    if source.name != OWN or not shared.is_file() or section(parse(shared)[1], shared) is None:
        return []
    return [f"{shown(source)} is read; [tool.emscan] in pyproject.toml beside it is not"]


@dataclass(frozen=True)
class _Place:
    """A table of a policy file, for messages and line numbers; ``nth`` of those of its name."""

    path: Path
    text: str
    table: str = ""  # as in the policy, "" for the top
    nth: int = 0

    @property
    def header(self) -> str:
        """The table's name in the file."""
        prefix = ".".join(SECTION) if self.path.name == SHARED else ""
        return ".".join(part for part in (prefix, self.table) if part)

    def where(self, key: str | None = None) -> str:
        """Return "emscan.toml:3", without the line where it cannot be told."""
        line = line_of(self.text, self.header, self.nth, key)
        return f"{shown(self.path)}{f':{line}' if line is not None else ''}"

    def error(self, message: str, hint: str, key: str | None = None) -> UsageError:
        """Return the error for a key."""
        return UsageError(f"{self.where(key)}: {message}", hint)


def _of_file(path: Path, *, named_by_user: bool) -> list[Part]:
    text, document = parse(path)
    content = section(document, path)
    if content is None and named_by_user:
        raise UsageError(f"{shown(path)} has no [tool.emscan]", "add it, or name another file with --config")
    top = _Place(path, text)
    if not isinstance(content, dict):
        raise top.error("tool.emscan is no table", "write [tool.emscan]")
    entries = _renamed(content, top)
    tables = {name: entries.pop(name) for name in (*_TABLES, "thresholds") if name in entries}
    values = _values(entries, top, named(RULES_OPTION, RUN, FILES, LIMIT), others=(*_TABLES, "thresholds"))
    values |= _thresholds(tables.get("thresholds", {}), top)
    overrides = tuple(
        _override(table, place) for table, place in _listed(tables.get("layer", []), "layer", top)
    )  # fmt: skip
    models = [_for_models(table, place) for table, place in _listed(tables.get("checkpoint", []), "checkpoint", top)]
    return [Part(values, overrides, None, top.where()), *models]


def _listed(tables: Any, name: str, top: _Place) -> Iterable[tuple[dict[str, Any], _Place]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        header = f"{'.'.join(SECTION)}.{name}" if top.path.name == SHARED else name
        raise top.error(f"{name} is not a list of tables", f"write [[{header}]]", name)
    written = name if f".{name}]]" in top.text or f"[[{name}]]" in top.text else name.replace("-", "_")
    for nth, table in enumerate(tables):
        place = _Place(top.path, top.text, written, nth)
        yield _renamed(table, place), place


def _thresholds(table: Any, top: _Place) -> dict[str, Value]:
    place = _Place(top.path, top.text, "thresholds")
    if not isinstance(table, dict):
        raise top.error("thresholds is no table", "write it as a table of its own", "thresholds")
    return _values(_renamed(table, place), place, named(THRESHOLD))


def _override(table: dict[str, Any], place: _Place) -> Override:
    """Return a [[layer]] table."""
    patterns = _globs(table, "pattern", place)
    values = _values(table, place, {"ignore": KEYS["ignore"], **named(LIMIT)}, others=("pattern",))
    for name in values:
        if name.endswith("-model"):
            raise place.error(f"{name} is of the whole model", f"use {name.removesuffix('-model')} here", name)
    ignored = values.pop("ignore", None)
    limits = [value.value for value in values.values()]
    for limit in limits:
        limit.layers = list(patterns)
    return Override(
        patterns, place.where(), tuple(Ignore(r, ignored.where, patterns) for r in ignored.value) if ignored else (),
        tuple(limits),
    )  # fmt: skip


def _for_models(table: dict[str, Any], place: _Place) -> Part:
    """Return a [[checkpoint]] table: what holds for the models whose path matches."""
    paths = _globs(table, "path", place)
    allowed = {"ignore": KEYS["ignore"], "fail-on": KEYS["fail-on"], **named(RUN, LIMIT)}
    return Part(_values(table, place, allowed, others=("path",)), (), paths, place.where())


def _globs(table: dict[str, Any], key: str, place: _Place) -> tuple[str, ...]:
    """Take out the globs that a table is for."""
    if key not in table:
        raise place.error(f"a [[{place.table}]] table without {key}", f'add {key} = "..."')
    given = table.pop(key)
    found = (given,) if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) and one for one in found):
        raise place.error(f"{key} is no glob", 'write text or a list of texts, e.g. "encoder.*"', key)
    return tuple(found)


def _renamed(table: Mapping[str, Any], place: _Place) -> dict[str, Any]:
    """Return a table with "-" for "_" in its keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name in found:
            raise place.error(f"{name} is set twice", "keep one of the two spellings", key)
        found[name] = value
    return found


def _values(
    table: Mapping[str, Any], place: _Place, allowed: Mapping[str, Key], others: Iterable[str] = ()
) -> dict[str, Value]:
    """Check the entries of a table; ``others``: keys that are read elsewhere, for suggestions."""
    found: dict[str, Value] = {}
    for name, value in table.items():
        if name not in allowed:
            raise _unknown(name, place, [*allowed, *others])
        where = place.where(_spelled(name, place))
        try:
            read = allowed[name].read(value)
        except ValueError as error:
            raise UsageError(f"{where}: {name} = {_said(value)}", str(error)) from None
        found[name] = Value(_relative(name, read, place.path.parent), where)
    return found


def _spelled(name: str, place: _Place) -> str:
    """Return a key as it stands in the file, with "_" or "-"."""
    spelled = name.replace("-", "_")
    return name if line_of(place.text, place.header, place.nth, name) is not None else spelled


def _unknown(name: str, place: _Place, known: list[str]) -> UsageError:
    hint = {THRESHOLD: "it belongs in the table thresholds", LIMIT: "it is a limit, which has no place here"}
    if name in KEYS:
        said = hint.get(KEYS[name].group, "it belongs at the top of the policy")
    elif name == "trust":
        said = "a file cannot vouch for other files: pass --trust"
    else:
        near = difflib.get_close_matches(name, known, 1)
        said = f"did you mean {near[0]}?" if near else "README lists the keys"
    table = f" in {place.table}" if place.table else ""
    return place.error(f"unknown key {name}{table}", said, _spelled(name, place))


def _said(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _relative(name: str, value: Any, folder: Path) -> Any:
    """Return a value that names files with paths that hold from the working directory."""
    if name not in _PATHS or folder == Path.cwd():
        return value
    if isinstance(value, tuple):
        return tuple(os.path.relpath(folder / one) for one in value)
    head, colon, tail = value.rpartition(":") if ":" in value else (value, "", "")
    if (folder / head).exists():  # else it is a module, or random
        return f"{os.path.relpath(folder / head)}{colon}{tail}"
    return value


def _of_environment(environment: Mapping[str, str]) -> dict[str, Value]:
    keys = {key.variable: key for key in KEYS.values()}
    found: dict[str, Value] = {}
    for variable, text in environment.items():
        if not variable.startswith("EMSCAN_") or variable in _OTHER_VARIABLES or not text:
            continue
        if variable not in keys:
            near = difflib.get_close_matches(variable, keys, 1)
            raise UsageError(
                f"environment: {variable} is no setting", f"did you mean {near[0]}?" if near else "unset it"
            )
        try:
            found[keys[variable].name] = Value(keys[variable].read(text), variable)
        except ValueError as error:
            raise UsageError(f"environment: {variable} = {_said(text)}", str(error)) from None
    return found


def _option(key: Key, value: Any) -> Value:
    """Return an option's value; of one that may be repeated, each may hold several, separated by commas."""
    try:
        parts = [part for one in value for part in _split(key, one)] if key.many else value
        return Value(key.read(parts), f"--{key.name}")
    except ValueError as error:
        raise UsageError(f"--{key.name} {_said(value)}", str(error)) from None


def _split(key: Key, text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if key.group == RULES_OPTION else [text]
