"""A policy as data: parts in rising precedence, and what they come to for one model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from emscan.policy.find import shown
from emscan.policy.keys import KEYS, LIMIT, RUN, THRESHOLD
from emscan.report.document import Limit, PolicyInfo, Thresholds

DEFAULT_FAIL_ON = ("warning",)


@dataclass(frozen=True)
class Value:
    """The value of a key, and where it was set: "emscan.toml:3", "EMSCAN_IGNORE", "--ignore"."""

    value: Any
    where: str


@dataclass(frozen=True)
class Ignore:
    """A rule that is suppressed; ``layers``: globs of the rows that it is for, None for everything."""

    rule: str
    where: str
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Override:
    """What holds for the rows that the globs ``layers`` match."""

    layers: tuple[str, ...]
    where: str
    ignore: tuple[Ignore, ...] = ()
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Part:
    """Values from one place; ``models``: globs of the paths that they are for, None for all."""

    values: Mapping[str, Value] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    models: tuple[str, ...] | None = None
    where: str = ""


@dataclass(frozen=True)
class Applied:
    """A policy as it is for one model. ``settings``: of the run, by key, those that are set."""

    source: str | None
    settings: Mapping[str, Any]
    select: tuple[str, ...]
    fail_on: tuple[str, ...]
    ignores: tuple[Ignore, ...]
    limits: tuple[Limit, ...]
    overrides: tuple[Override, ...]
    thresholds: Thresholds

    def info(self) -> PolicyInfo:
        """Return what the report says about it."""
        ignored = [f"{i.rule} in {', '.join(i.layers)}" if i.layers else i.rule for i in self.ignores]
        return PolicyInfo(self.source, list(self.select), ignored, list(self.fail_on), list(self.limits))


@dataclass(frozen=True)
class Policy:
    """``parts`` in rising precedence: the file, its tables for some models, the environment, options.

    ``source``: the file, None without one. ``notes``: what a reader should know about how it was found.
    """

    source: Path | None = None
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()

    def at(self, model: str | None) -> Applied:
        """Return the policy for the model at a path."""
        parts = [part for part in self.parts if part.models is None or self._is_of(model, part.models)]
        values = {name: value for part in parts for name, value in part.values.items()}
        limits: list[Limit] = []
        for part in parts:
            limits += [value.value for name, value in part.values.items() if KEYS[name].group == LIMIT]
            limits += [limit for override in part.overrides for limit in override.limits]
        changed = {n.replace("-", "_"): v.value for n, v in values.items() if KEYS[n].group == THRESHOLD}
        overrides = tuple(override for part in parts for override in part.overrides)
        return Applied(
            shown(self.source) if self.source is not None else None,
            {name: value.value for name, value in values.items() if KEYS[name].group == RUN},
            self._get(values, "select", ()),
            self._get(values, "fail-on", DEFAULT_FAIL_ON),
            _ignores(parts) + tuple(ignore for override in overrides for ignore in override.ignore),
            tuple(limits),
            overrides,
            dataclasses.replace(Thresholds(), **changed),
        )

    def setting(self, name: str) -> Any:
        """Return the value of a key that is the same for all models, None where it is not set."""
        found = [part.values[name].value for part in self.parts if part.models is None and name in part.values]
        return found[-1] if found else None

    def skips(self, model: str) -> str | None:
        """Return the glob that leaves a model out, None where none does."""
        return next((glob for glob in self.setting("skip") or () if self._is_of(model, (glob,))), None)

    def unused_tables(self, models: Sequence[str]) -> list[Part]:
        """Return the tables for some models that are for none of these."""
        return [p for p in self.parts if p.models is not None and not any(self._is_of(m, p.models) for m in models)]

    def _is_of(self, model: str | None, globs: Sequence[str]) -> bool:
        """Whether a path is, or is below, what a glob relative to the policy's folder matches; or its last part alone."""
        if model is None:
            return False
        folder = self.source.parent if self.source is not None else Path()
        names = {Path(model).as_posix(), Path(model).name, Path(os.path.relpath(model, folder)).as_posix()}
        return any(fnmatchcase(name, glob) or name == glob.rstrip("/") for name in names for glob in globs)

    @staticmethod
    def _get(values: Mapping[str, Value], name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        return values[name].value if name in values else default


def _ignores(parts: Sequence[Part]) -> tuple[Ignore, ...]:
    """A later list replaces an earlier one; that of a table for some models adds to it."""
    found: tuple[Ignore, ...] = ()
    for part in parts:
        if "ignore" in part.values:
            value = part.values["ignore"]
            own = tuple(Ignore(rule, value.where) for rule in value.value)
            found = own if part.models is None else found + own
    return found
