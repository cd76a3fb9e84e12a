"""The architecture that `--model TARGET` names: the user's own code, imported and called."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from emscan.errors import ModelError, UsageError
from emscan.load.source import brief, printable
from emscan.load.unsafe import foreign_code

_FORMS = "write --model package.module:callable or --model path/to/file.py:callable"
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen")


def build(target: str) -> nn.Module:
    """Return the module that ``target`` names: an instance, or what a class or factory returns without arguments.

    Raises UsageError where the target does not exist, ModelError where the user's own code raised.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UsageError(f"--model {target} does not name a callable", _FORMS)
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UsageError(f"--model {target}: there is no file {place}", _FORMS)
    folder = Path(place).resolve().parent if is_file else Path.cwd()
    with _importable(folder), foreign_code():
        value: Any = _import_file(Path(place).resolve(), target) if is_file else _import_module(place, target)
        for part in attribute.split("."):
            if not hasattr(value, part):
                raise UsageError(f"--model {target}: {place} has no {attribute}", _FORMS)
            value = getattr(value, part)
        if not isinstance(value, nn.Module):
            value = _call(value, target)
    if not isinstance(value, nn.Module):
        raise UsageError(f"--model {target} gives a {type(value).__name__}, not a torch.nn.Module", _FORMS)
    return value


def user_error(error: BaseException, doing: str) -> ModelError:
    """Return the ModelError that says the user's own code raised ``error``, and in which of its lines."""
    where = ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" at {error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(_OURS)]
        where = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return ModelError(f"{doing} raised {brief(error)}{where}", "this is the model's own code: mend it there")


def _call(value: Any, target: str) -> Any:
    if not callable(value):
        raise UsageError(f"--model {target} is a {type(value).__name__}, neither a module nor callable", _FORMS)
    try:
        return value()
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and _raised_by_call(error):
            reason = printable(error)
            raise UsageError(
                f"--model {target} cannot be called without arguments ({reason})", "name a function that needs none"
            ) from None
        raise user_error(error, f"calling {target}") from error


def _raised_by_call(error: BaseException) -> bool:
    """Whether the call itself failed, before a line of the user's ran."""
    return all(frame.filename.startswith(_OURS) for frame in traceback.extract_tb(error.__traceback__))


def _import_module(name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(f"--model {target}: there is no module {error.name}", _FORMS) from None
        raise user_error(error, f"importing {name}") from error
    except (Exception, SystemExit) as error:
        raise user_error(error, f"importing {name}") from error


def _import_file(path: Path, target: str) -> ModuleType:
    # A name of its own: a file called like an installed package must not replace that package.
    name = f"_emscan_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--model {target}: {path} cannot be imported", _FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and TorchScript look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise user_error(error, f"importing {path.name}") from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's code import its neighbours, as running it as a script would."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
