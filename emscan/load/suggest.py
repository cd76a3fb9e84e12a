"""What to try where a file holds only weights: the command, with the class beside the file whose names fit best.

Python files beside the weights, and in the current folder, are parsed and never run.
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MOST_FILES = 50
_LARGEST = 1 << 20  # bytes of a file that is read


@dataclass(frozen=True)
class Candidate:
    """A class of modules in a Python file: the parts that it assigns, the arguments that it cannot do without."""

    path: Path
    name: str
    parts: frozenset[str]
    required: tuple[str, ...]


def command(path: str, names: Iterable[str]) -> str:
    """Return the command line that audits the weights at ``path``, tensors ``names``, with an architecture.

    The class is one in a Python file beside the weights, or in the current folder, that assigns all the parts which the
    names begin with; where there is none, ``file.py:callable`` stands for it.
    """
    wanted = {name.partition(".")[0] for name in names}
    found = sorted(
        (c for c in _candidates(Path(path)) if wanted and wanted <= c.parts), key=lambda c: len(c.parts - wanted)
    )
    if not found:
        return f"emscan audit {shlex.quote(path)} --model file.py:callable"
    best = found[0]
    arguments = "".join(f" --model-arg {name}=..." for name in best.required)
    return f"emscan audit {shlex.quote(path)} --model {shlex.quote(f'{best.path}:{best.name}')}{arguments}"


def _candidates(weights: Path) -> Iterator[Candidate]:
    beside = weights if weights.is_dir() else weights.parent
    seen: set[Path] = set()
    for folder in (beside, Path()):
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            files = sorted(file for file in folder.glob("*.py") if file.is_file())[:_MOST_FILES]
        except OSError:
            continue
        for file in files:
            yield from _classes(file)


def _classes(file: Path) -> Iterator[Candidate]:
    try:
        if file.stat().st_size > _LARGEST:
            return
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.bases:
            start = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
            if start is not None:
                yield Candidate(file, node.name, frozenset(_assigned(start)), _required(start))


def _assigned(function: ast.FunctionDef) -> Iterator[str]:
    """Yield the names of attributes that a constructor assigns or registers."""
    own = function.args.args[0].arg if function.args.args else "self"
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is(node.value, own):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is(node.func.value, own):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value  # register_buffer("name", ...), add_module


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _required(function: ast.FunctionDef) -> tuple[str, ...]:
    given = function.args
    plain = [*given.posonlyargs, *given.args][1:]
    keywords = [a.arg for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    return (*(a.arg for a in plain[: len(plain) - len(given.defaults)]), *keywords)
