"""Options of a probe, ``--probe-arg name=value``: known names per kind of probe, values checked when they are read."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emscan.errors import ProbeError, UsageError
from emscan.load.source import brief, printable

LONGEST_SIDE = 16_384  # pixels that an option may ask for
_LARGEST = 1 << 24  # bytes of a configuration
_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Arguments:
    """The options given for one probe. Raises UsageError for a name that ``what`` (a kind of probe) does not take."""

    def __init__(self, given: Mapping[str, str] | None, known: tuple[str, ...], what: str) -> None:
        self._given = dict(given or {})
        for name in self._given:
            if name in known:
                continue
            near = difflib.get_close_matches(name, known, 1)
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            hint = (
                f"did you mean {near[0]}?"
                if near
                else "leave it out"
                if not known
                else f"use one of {', '.join(known)}"
            )
            raise UsageError(f"--probe-arg {printable(name, 60)}: {what} {takes}", hint)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def text(self, name: str) -> str | None:
        """Return the value as it was given, None where it was not."""
        return self._given.get(name)

    def wrong(self, name: str, hint: str) -> UsageError:
        """Return the error for a value that does not do."""
        return UsageError(f"--probe-arg {name}={printable(self._given[name], 60)}: no such value", hint)

    def number(self, name: str, low: int, high: int) -> int | None:
        """Return an integer within bounds."""
        value = self._given.get(name)
        if value is None:
            return None
        if not value.strip().isdecimal() or not low <= int(value) <= high:
            raise self.wrong(name, f"give a whole number from {low:,} to {high:,}")
        return int(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        """Return one of ``choices``."""
        value = self._given.get(name)
        if value is not None and value.strip().lower() not in choices:
            raise self.wrong(name, f"use one of {', '.join(choices)}")
        return None if value is None else value.strip().lower()

    def flag(self, name: str) -> bool | None:
        """Return a truth value."""
        value = self._given.get(name)
        if value is not None and value.strip().lower() not in _YES_NO:
            raise self.wrong(name, "give true or false")
        return None if value is None else _YES_NO[value.strip().lower()]

    def sides(self, name: str) -> tuple[int, ...] | None:
        """Return ``(edge,)`` of ``224`` or ``(height, width)`` of ``224x192`` or ``224,192``."""
        value = self._given.get(name)
        if value is None:
            return None
        parts = value.lower().replace("x", ",").split(",")
        if len(parts) not in (1, 2) or not all(p.strip().isdecimal() and 0 < int(p) <= LONGEST_SIDE for p in parts):
            raise self.wrong(name, f"give pixels: 224, or 224x192 for height x width, at most {LONGEST_SIDE:,}")
        return tuple(int(part) for part in parts)

    def numbers(self, name: str, *, positive: bool = False) -> tuple[float, ...] | None:
        """Return finite numbers, separated by commas, one per channel or one for all."""
        value = self._given.get(name)
        if value is None:
            return None
        try:
            found = tuple(float(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or not all(math.isfinite(x) and (x > 0 or not positive) for x in found):
            raise self.wrong(name, f"give {'positive ' * positive}numbers, one per channel: 0.485,0.456,0.406")
        return found


def settings(folder: Path | None, name: str) -> dict[str, Any]:
    """Return the JSON object in ``folder/name``, {} where there is no such file.

    Raises ProbeError for a file that is no JSON object or beyond 16 MiB.
    """
    if folder is None or not os.path.isfile(folder / name):  # noqa: PTH113 - Path.is_file raises on odd names
        return {}
    path = folder / name
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ProbeError(f"cannot read {path}: {brief(error)}", "correct it, or copy it again") from None
    if not isinstance(found, dict):
        raise ProbeError(f"cannot read {path}: it is no JSON object", "correct it, or copy it again")
    return found
