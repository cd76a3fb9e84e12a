"""Probes that are the user's own code: `package.module:callable` or `path/to/file.py:callable`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from emscan.errors import ProbeError
from emscan.load.source import brief, printable
from emscan.load.unsafe import foreign_code

_FORMS = "write --probe package.module:callable or --probe path/to/file.py:callable"
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen")


def user_error(error: BaseException, doing: str) -> ProbeError:
    """Return the ProbeError that says the user's own code raised ``error``, and in which of its lines."""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" at {error.filename}:{error.lineno}"
    else:
        theirs = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
        where = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return ProbeError(f"{doing} raised {brief(error)}{where}", "this is the probe's own code: mend it there")


def guarded_iterator(values: Any, what: str) -> Iterator[Any]:
    """Yield from the user's iterable; what it prints goes to stderr, what it raises becomes a ProbeError."""
    end = object()
    try:
        with foreign_code():
            iterator = iter(values)
    except Exception as error:
        raise user_error(error, f"iterating over {what}") from error
    while True:
        try:
            with foreign_code():
                value = next(iterator, end)
        except Exception as error:
            raise user_error(error, f"iterating over {what}") from error
        if value is end:
            return
        yield value


def find(spec: str) -> Callable[[], Any]:
    """Return a function that gives the batches which ``spec`` names, afresh at every call.

    Raises ProbeError where the target does not exist or its own code raises.
    """
    place, _, attribute = spec.rpartition(":")
    value = _import(place, spec)
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ProbeError(f"--probe {spec}: {place} has no {attribute}", _FORMS)
        value = getattr(value, part)
    if not callable(value) or isinstance(value, torch.Tensor):
        return lambda: value
    return lambda: _call(value, spec)


def _call(function: Callable[[], Any], spec: str) -> Any:
    try:
        with foreign_code():
            return function()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, TypeError) and all(frame.filename.startswith(_OURS) for frame in frames):
            reason = printable(error)
            hint = "name a function that needs none"
            raise ProbeError(f"--probe {spec} cannot be called without arguments ({reason})", hint) from None
        raise user_error(error, f"calling {spec}") from error


def _import(place: str, spec: str) -> Any:
    is_file = place.endswith(".py")
    path = Path(place).resolve()
    if is_file and not path.is_file():
        raise ProbeError(f"--probe {spec}: there is no file {place}", _FORMS)
    neighbours = str(path.parent if is_file else Path.cwd())
    sys.path.insert(0, neighbours)  # as running the file as a script would
    try:
        with foreign_code():
            return _import_file(path) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_file and error.name and (place == error.name or place.startswith(error.name + ".")):
            raise ProbeError(f"--probe {spec}: there is no module {error.name}", _FORMS) from None
        raise user_error(error, f"importing {place}") from error
    except (Exception, SystemExit) as error:
        raise user_error(error, f"importing {place}") from error
    finally:
        if neighbours in sys.path:
            sys.path.remove(neighbours)


def _import_file(path: Path) -> Any:
    # A name of its own: a file called like an installed package must not replace that package.
    name = f"_emscan_probe_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
