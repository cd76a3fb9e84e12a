"""A starting policy: what a first audit shows is allowed, more is not; every line says what it means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from emscan.policy.document import DEFAULT_FAIL_ON
from emscan.policy.selectors import selects
from emscan.report.document import Layer, Report
from emscan.rules.limits import MEASURES, Reading

_HEAD = (
    "# What `emscan check` asks of the models of this project.",
    "# Keys may be written with - or _; `emscan check --help` lists them all, `emscan rule CODE` explains a rule.",
)
_COUNTED = ("max-dead", "max-starved")  # limits with tables for the layers that need more
_MEASURED = ("min-information", "max-violation")
_WHY = {
    "max-dead": "dead: no gradient on any value of the probe (or on any input at all)",
    "max-starved": "starved: less than 1 % of the uniform share of the load",
    "min-information": "near 0 the responsibilities do not depend on the input",
    "max-violation": "the busiest expert's load over 1/K, less one",
}
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment of a name


def starting_policy(report: Report | None, settings: Mapping[str, Any], header: str = "") -> str:
    """Return a policy as TOML. ``settings``: of the run, by key; ``header``: what its tables are below ("tool.emscan").

    With a report, limits are what its rows show, rounded up (those that ask for a least number: down); findings that
    would count in spite of that are ignored by name, so that a check of the same model passes.
    """
    lines = [f"[{header}]"] if header else []
    lines += _HEAD
    if report is not None:
        lines.append(f"# Begun from an audit of {_comment(report.model.path or 'a model')}: limits are what it shows.")
        if report.probe.synthetic:
            lines.append(
                "# Its probe was synthetic, so counts are indicative: give real samples as probe and start again."
            )
    lines += ["", *_settings(settings), *_fail_on()]
    if report is None:
        return "\n".join([*lines, *_examples(), ""])
    wanted: dict[str, dict[str, str]] = {}
    lines += [*_limits(report, wanted), *_ignored(report, wanted)]
    return "\n".join([*lines, *_tables(wanted, header)])


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings:
        yield "# What the models are run on, and how; paths are relative to this file."
        yield from (f"{key} = {_toml(value)}" for key, value in settings.items())
    else:
        yield '# probe = "probe.safetensors"  # what the models are run on'
    yield ""


def _fail_on() -> Iterator[str]:
    yield "# What counts, besides limits that are not met: a level (error, warning, note; worse ones too) or rules."
    yield f"fail-on = {_toml(list(DEFAULT_FAIL_ON))}"
    yield ""


def _examples() -> Iterator[str]:
    yield '# Limits: a share of a layer\'s components ("5%") or a number of them.'
    yield from (f'# {name} = "5%"  # {_WHY[name]}' for name in _COUNTED)
    yield '# min-information = "1%"  # of ln K; ' + _WHY["min-information"]
    yield ""
    yield '# ignore = ["EM108"]  # rules that do not count, here or in a table for some layers:'
    yield "# [[layer]]"
    yield '# pattern = "encoder.*"'
    yield '# max-dead = "10%"'


def _limits(report: Report, wanted: dict[str, dict[str, str]]) -> Iterator[str]:
    """Yield the limits for all layers; what single layers need goes into their tables, ``wanted``: pattern -> values."""
    lines = []
    for name in _COUNTED:
        found = _readings(report, name)
        if found:
            lines.append(f"{name} = 0  # {_WHY[name]}")
            for pattern, share in _worst(found):
                wanted.setdefault(pattern, {})[name] = f'"{share}%"'
    for name in _MEASURED:
        found = _readings(report, name)
        if found and not _bad(report, name):
            lines.append(f"{name} = {_bound(name, found)}  # {_WHY[name]}")
    if lines:
        yield "# Limits. Layers that show more now have tables below; lower their limits as they get better."
        yield from (*lines, "")


def _tables(wanted: Mapping[str, Mapping[str, str]], header: str) -> Iterator[str]:
    for pattern, values in wanted.items():
        yield f"[[{header + '.' if header else ''}layer]]"
        yield f"pattern = {_toml(pattern)}"
        yield from (f"{name} = {value}" for name, value in values.items())
        yield ""


def _bad(report: Report, name: str) -> bool:
    """Whether a warning says that the number is bad: a limit at what it is now would make that the aim."""
    return any(f.rule in MEASURES[name].decides and f.level != "note" for f in report.findings)


def _readings(report: Report, name: str) -> list[tuple[Layer, Reading]]:
    return [(row, found) for row in report.layers if (found := MEASURES[name].read(row)) is not None]


def _worst(found: Sequence[tuple[Layer, Reading]]) -> Iterator[tuple[str, int]]:
    """Yield a pattern and its share in whole percent, of rows that differ only by index together, the least first.

    Of several patterns that match a row the last one holds, so the one that allows most has to come last.
    """
    shares: dict[str, int] = {}
    for row, reading in found:
        if reading.value:
            pattern = _pattern(row.name)
            shares[pattern] = max(shares.get(pattern, 0), math.ceil(100 * reading.value / reading.whole - 1e-9))
    yield from sorted(shares.items(), key=lambda one: one[1])


def _pattern(name: str) -> str:
    """Return the glob of a name and of those that differ only by index; characters of globs stand for themselves."""
    plain = re.sub(r"([*?[])", r"[\1]", name)
    return _INDEX.sub("*", plain) if "." in name else plain


def _bound(name: str, found: Sequence[tuple[Layer, Reading]]) -> str:
    """Return the number that all rows keep: one digit, towards what is allowed, since such numbers never stand still."""
    if MEASURES[name].most:
        return f"{_rounded(max(r.value for _, r in found), math.ceil):g}"
    return f'"{_rounded(100 * min(r.value / r.whole for _, r in found), math.floor):.10g}%"'


def _rounded(value: float, way: Callable[[float], int]) -> float:
    if value <= 0:
        return 0.0
    step = 10.0 ** math.floor(math.log10(value))
    return way(value / step) * step


def _ignored(report: Report, wanted: dict[str, dict[str, str]]) -> Iterator[str]:
    """Yield what counts at first although no limit is for it, to be ignored: that of layers goes into their tables."""
    limits = (*_COUNTED, *(name for name in _MEASURED if not _bad(report, name)))
    decided = {rule for name in limits for rule in MEASURES[name].decides}
    found = [f for f in report.findings if f.rule not in decided and any(selects(s, f) for s in DEFAULT_FAIL_ON)]
    rules: dict[str, list[str]] = {}  # pattern, or "" -> rules
    said: dict[tuple[str, str], str] = {}
    for finding in found:
        pattern = _pattern(finding.layer) if finding.layer is not None else ""
        if said.setdefault((finding.rule, pattern), finding.message) is finding.message:
            rules.setdefault(pattern, []).append(finding.rule)
    if not said:
        return
    yield "# Found in the first audit, and ignored so that a check can start from here. Look at each, then take it out:"
    yield from (f"#   {rule} {_comment(message)}" for (rule, _), message in said.items())
    if "" in rules:
        yield f"ignore = {_toml(rules.pop(''))}"
    yield ""
    for pattern, names in rules.items():
        wanted.setdefault(pattern, {})["ignore"] = _toml(names)


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _toml(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(one) for one in value)}]"
    return '"' + "".join(_escaped(c) for c in str(value)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if not character.isprintable():
        return f"\\U{ord(character):08x}" if not 0xD800 <= ord(character) < 0xE000 else "?"
    return character
