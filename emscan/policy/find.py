"""Which file holds the policy: the nearest emscan.toml, or pyproject.toml with [tool.emscan], from a folder upward."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from emscan.errors import UsageError

OWN, SHARED = "emscan.toml", "pyproject.toml"
SECTION = ("tool", "emscan")


def find(start: Path) -> Path | None:
    """Return the policy file nearest to ``start``. The search ends at the root of the repository, or at home."""
    home = Path.home().resolve()
    folder = start.resolve()
    for here in (folder, *folder.parents):
        if (here / OWN).is_file():
            return here / OWN
        shared = here / SHARED
        if shared.is_file() and section(parse(shared)[1], shared) is not None:
            return shared
        if (here / ".git").exists() or here == home:
            return None
    return None


def parse(path: Path) -> tuple[str, dict[str, Any]]:
    """Return text and content of a TOML file. Raises UsageError that says where it is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"cannot use {shown(path)}: it is not UTF-8", "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"cannot read {shown(path)}: {why}", "name a policy file, or --no-config") from None
    try:
        return text, tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"cannot use {shown(path)}: it is no TOML: {why}", "repair it, or pass --no-config") from None


def section(document: dict[str, Any], path: Path) -> Any:
    """Return the part of a file that is the policy; None for a pyproject.toml without one."""
    if path.name != SHARED:
        return document
    tool = document.get(SECTION[0])
    return tool.get(SECTION[1]) if isinstance(tool, dict) else None


def shown(path: Path) -> str:
    """Return a path relative to the working directory where it is below it."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.as_posix()
