"""The user's own code, which --model and --probe name: found, called, and its exceptions shown as its own."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from emscan.errors import EmscanError, UsageError
from emscan.load.source import brief, printable
from emscan.load.unsafe import foreign_code

_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<frozen")
_FRAMES = 30  # of the user's code that a traceback shows
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_theirs: set[str] = set()  # where the code lies that the options have named: a folder or a file


@dataclass(frozen=True)
class Role:
    """What the code is for: its option, its name in messages, the errors for a wrong target and for its exceptions."""

    option: str
    whose: str
    wrong: type[EmscanError]
    failed: type[EmscanError]

    @property
    def forms(self) -> str:
        """How to name a target."""
        return f"write {self.option} package.module:callable or {self.option} path/to/file.py:callable"

    def error(self, error: BaseException, doing: str, *, named: bool = True) -> EmscanError:
        """Return the error that says the user's code raised ``error``, where, and with its traceback.

        ``named``: an option names the code that was running; else only code that one has named gets a traceback.
        """
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        if isinstance(error, SyntaxError) and error.filename:
            where = f" at {error.filename}:{error.lineno}"
        said = self.failed(f"{doing} raised {brief(error)}{where}", f"this is {self.whose} own code: mend it there")
        said.traceback = _shown(error, named)
        return said


def _shown(error: BaseException, named: bool) -> str:
    """Return the traceback from the first line of the user's on; nothing where no such line was running."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and not _is_theirs(trace.tb_frame.f_code.co_filename, named):
        trace = trace.tb_next
    if trace is None and not (named and isinstance(error, SyntaxError)):
        return ""
    lines = traceback.TracebackException(type(error), error, trace, limit=-_FRAMES, compact=True).format(chain=False)
    return "".join(lines).rstrip()


def _is_theirs(filename: str, named: bool) -> bool:
    if named:
        return not filename.startswith(_OURS)
    return any(filename.startswith(place) for place in _theirs)


def find(target: str, role: Role) -> Any:
    """Return what ``package.module:attribute`` or ``path/to/file.py:attribute`` names.

    Raises ``role.wrong`` where it does not exist, ``role.failed`` where importing it raised.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise role.wrong(f"{role.option} {target} does not name a callable", role.forms)
    with foreign_code(), neighbours(target):
        value: Any = _import(place, target, role)
        for part in attribute.split("."):
            if not hasattr(value, part):
                raise role.wrong(f"{role.option} {target}: {place} has no {attribute}", role.forms)
            value = getattr(value, part)
    return value


def call(value: Any, target: str, role: Role, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return what a callable returns for keyword arguments; raises as `find` does."""
    named = dict(arguments or {})
    _check_arguments(value, target, role, named)
    with foreign_code(), neighbours(target):
        try:
            return value(**named)
        except (Exception, SystemExit) as error:
            raise role.error(error, f"calling {target}") from error


def _check_arguments(value: Any, target: str, role: Role, named: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # compiled code need not have one
        return
    try:
        signature.bind(**named)
    except TypeError as error:
        shown = printable(f"{target.rpartition(':')[2]}{signature}", 160)
        wrong = next((name for name in named if name not in signature.parameters), "")
        near = difflib.get_close_matches(wrong, signature.parameters, 1)
        given = f"with {', '.join(named)}" if named else "without arguments"
        hint = f"give {role.option}-arg NAME=VALUE for each that it needs"
        raise role.wrong(
            f"{role.option} {target} cannot be called {given} ({printable(error)}): it is {shown}",
            f"did you mean {near[0]}?"
            if near
            else hint
            if role.option == "--model"
            else "name a function that needs none",
        ) from None


def split_arguments(given: Sequence[str], option: str) -> dict[str, str]:
    """Return the texts of NAME=VALUE by name. Raises UsageError for what has no name, or a name that comes twice."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{option} {item} is not of the form NAME=VALUE", f"write e.g. {option} width=64")
        if name in found:
            raise UsageError(f"{option} gives {name} twice", "give each name once")
        found[name] = text
    return found


def parse_arguments(given: Sequence[str], option: str) -> dict[str, Any]:
    """Return the values of NAME=VALUE by name: Python literals, true, false and none, and text for all else."""
    return {name: _value(text) for name, text in split_arguments(given, option).items()}


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


def shown(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return arguments as a report can have them: plain values as they are, anything else as Python writes it."""
    plain = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, plain) else repr(value) for name, value in (arguments or {}).items()}


@contextlib.contextmanager
def neighbours(target: str | None, *, first: bool = True) -> Iterator[None]:
    """Let the user's code import what lies beside it, as running it as a script would.

    ``first``: before all else; not so for a whole run, in which a file called like a module of ours would replace it.
    """
    place, _, attribute = (target or "").rpartition(":")
    if not place or not attribute:
        yield
        return
    entry = str(Path(place).resolve().parent if place.endswith(".py") else Path.cwd())
    sys.path.insert(0 if first else len(sys.path), entry)
    try:
        yield
    finally:
        if entry in sys.path:
            del sys.path[sys.path.index(entry) if first else len(sys.path) - 1 - sys.path[::-1].index(entry)]


def _import(place: str, target: str, role: Role) -> ModuleType:
    is_file = place.endswith(".py")
    path = Path(place).resolve()
    if is_file and not path.is_file():
        raise role.wrong(f"{role.option} {target}: there is no file {place}", role.forms)
    try:
        if is_file:
            _theirs.add(str(path.parent))
            return _import_file(path)
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_file and error.name and (place == error.name or place.startswith(error.name + ".")):
            raise role.wrong(f"{role.option} {target}: there is no module {error.name}", role.forms) from None
        raise role.error(error, f"importing {path.name if is_file else place}") from error
    except (Exception, SystemExit) as error:
        raise role.error(error, f"importing {path.name if is_file else place}") from error
    root = sys.modules.get(place.partition(".")[0], module)
    _theirs.update(getattr(root, "__path__", None) or [getattr(root, "__file__", None) or place])
    return module


def _import_file(path: Path) -> ModuleType:
    # A name of its own: a file called like an installed package must not replace that package.
    stem = re.sub(r"\W", "_", path.stem)
    name = f"_emscan_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and TorchScript look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
