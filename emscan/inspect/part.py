"""What was found in one file, before it becomes a document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from emscan.inspect.document import ModuleInfo, PickleInfo, Status, TensorInfo
from emscan.load.source import RefusalError


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor's elements lie: from byte ``start``, ``offset`` and ``stride`` in elements."""

    start: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    big: bool = False  # bytes in big-endian order


@dataclass(slots=True)
class Entry:
    """A tensor. ``weight``: it counts as a parameter of the model; ``same``: equal for tensors that share their data."""

    info: TensorInfo
    view: View | None = None
    weight: bool = True
    same: Any = None


@dataclass
class Part:
    """One file. ``refusal``: why the loader takes it only with --trust, or not at all.

    ``whole``: it holds its architecture; ``tensors_only``: with --model the loader takes its tensors all the same.
    """

    format: str
    title: str
    entries: list[Entry] = field(default_factory=list)
    modules: list[ModuleInfo] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    pickle: PickleInfo | None = None
    refusal: RefusalError | None = None
    whole: bool = False
    tensors_only: bool = False
    status: Status = "inspected"
    notes: list[str] = field(default_factory=list)
