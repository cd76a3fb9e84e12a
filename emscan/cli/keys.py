"""Options of a command made from the keys of a policy, so that file, environment and command line cannot differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import typer

from emscan.policy.keys import KEYS, RULES_OPTION, Key
from emscan.rules import LEVELS, RULES

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_options(*groups: str, without: tuple[str, ...] = ()) -> Callable[[_Command], _Command]:
    """Give a command, in place of its ``**options``, an option for every key of some groups.

    The command gets them by key with "_" for "-", as text, None where not given.
    """

    def decorate(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(key) for key in KEYS.values() if key.group in groups and key.name not in without]
        command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *made)} | {"return": None}
        return command

    return decorate


def by_key(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command got, by the names of the keys; what was not given is left out."""
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return {name: value for name, value in named.items() if name in KEYS and value not in (None, [])}


def codes(incomplete: str) -> list[tuple[str, str]]:
    """Return what completes the beginning of a level or a rule's code, each with a word on it."""
    known = [*((level, "level") for level in LEVELS), *((code, RULES[code].name) for code in sorted(RULES))]
    return [one for one in known if one[0].lower().startswith(incomplete.lower())]


def _parameter(key: Key) -> inspect.Parameter:
    more = " May be repeated." if key.many else ""
    kind: Any = bool | None if key.flag else list[str] if key.many else str | None
    default = typer.Option(
        [] if key.many else None,
        f"--{key.name}/--no-{key.name}" if key.flag else f"--{key.name}",
        metavar=None if key.flag else key.form,
        help=f"{key.what}{more}",
        show_default=False,
        autocompletion=codes if key.group == RULES_OPTION else None,
    )
    name = key.name.replace("-", "_")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
