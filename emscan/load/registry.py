"""The file formats: each is one file `format_*.py` in this folder that holds one subclass of `Format`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from emscan.load.source import RefusalError, Source, UnsafeError

if TYPE_CHECKING:
    import torch
from emscan.report.document import Misfit


@dataclass(frozen=True)
class Options:
    """What the user allows and where tensors go. ``partial``: weights that fill a part of a model are enough.

    ``weights_only``: the architecture comes from elsewhere, so that of a pickled module only the tensors are wanted.
    """

    trust: bool
    device: torch.device
    partial: bool = False
    weights_only: bool = False


@dataclass
class Content:
    """What a file holds: ``value`` a module, or nested containers of tensors that `weights` makes sense of.

    ``sha256``: of all files that were read, where there were more than the one. ``misfit``: what of a module's weights
    did not fit, where that was allowed.
    """

    value: Any
    trusted: bool = False
    notes: list[str] = field(default_factory=list)
    sha256: str | None = None
    misfit: Misfit | None = None


class Format(ABC):
    """One kind of file. The content decides, the name (``suffixes``) only words a refusal."""

    name: ClassVar[str]  # what `model.format` of the report says
    title: ClassVar[str]  # with its article, for messages
    suffixes: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[bool] = False  # the file stands for a folder, and is never one of its shards
    either: ClassVar[bool] = False  # a module or weights; the report's format name then says which

    @abstractmethod
    def matches(self, source: Source) -> bool:
        """Whether the content is of this format; formats exclude each other."""

    @abstractmethod
    def load(self, source: Source, options: Options) -> Content:
        """Load the content; raises RefusalError, or UnsafeError where ``options.trust`` would allow it."""


def require_trust(options: Options, what: str) -> None:
    """Raise UnsafeError that says ``what`` the format can do, unless the user trusts the file."""
    if not options.trust:
        raise UnsafeError(what, "if you trust where it comes from, pass --trust")


@functools.cache
def formats() -> tuple[Format, ...]:
    """Return one instance of every format in this folder."""
    package = importlib.import_module(__package__)
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.name.startswith("format_"):
            importlib.import_module(f"{__package__}.{entry.name}")
    kinds = sorted(Format.__subclasses__(), key=lambda kind: kind.__module__)
    return tuple(kind() for kind in kinds if kind.__module__.startswith(f"{__package__}."))


def detect(source: Source, candidates: Iterable[Format]) -> Format:
    """Return the format of a file; raises RefusalError that names what the file is instead."""
    from emscan.load.foreign import READABLE, describe

    for candidate in candidates:
        if candidate.matches(source):
            return candidate
    what, hint = describe(source)
    named = [candidate.title for candidate in candidates if source.suffix in candidate.suffixes]
    like = f", not {named[0]} as its name says" if named and hint == READABLE else ""
    raise RefusalError(f"it is {what}{like}", hint)
