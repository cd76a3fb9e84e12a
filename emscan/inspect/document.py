"""What is in a file, as data: what `emscan inspect --format json` writes. No torch here.

Field names are the contract of schema version 1; a trailing underscore is Python's alone. ``null`` where a thing does
not apply or is not known.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Status = Literal["inspected", "not supported"]


@dataclass
class FileInfo:
    """One file that was looked into, by its name in the folder; ``bytes`` is null where it is missing."""

    name: str
    bytes: int | None
    format: str


@dataclass(slots=True)
class TensorInfo:
    """One tensor. ``bytes``: what its elements take. ``nan``, ``inf``: how many of them are, where values were checked.

    ``shape`` and ``dtype`` are null where only the name is known, as of a missing shard.
    """

    name: str
    dtype: str | None
    shape: list[int] | None
    bytes: int | None
    file: str
    nan: int | None = None
    inf: int | None = None


@dataclass
class Totals:
    """``parameters``: elements of the model's weights, each storage once, training state left out.

    ``tensors`` and ``dtypes`` count every tensor in the list, ``bytes`` those of shared data once.
    """

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)


@dataclass
class ModuleInfo:
    """A pickled module: its dotted name ("" for the root) and its class as the file names it."""

    name: str
    class_: str


@dataclass
class Refused:
    """A name that unpickling would import and that is not loaded without --trust, and why."""

    name: str
    reason: str


@dataclass
class PickleInfo:
    """Every global that the file's pickles would import, and those of them that are refused."""

    imports: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def merge(self, other: PickleInfo) -> None:
        """Add what another file's pickle names."""
        self.imports += [name for name in other.imports if name not in self.imports]
        self.refused += [one for one in other.refused if one not in self.refused]


@dataclass
class AuditInfo:
    """Whether `emscan audit` can take it. ``command``: the line to type; ``reason``: why not, or why --trust or --model."""

    supported: bool
    needs_trust: bool = False
    command: str | None = None
    reason: str | None = None


@dataclass
class Inspection:
    """One file or folder. ``title``: its format in words; ``bytes``: of all its files that were looked into."""

    tool: dict[str, str]
    path: str
    status: Status
    format: str
    title: str
    bytes: int
    audit: AuditInfo
    files: list[FileInfo] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    metadata: dict[str, Any] = field(default_factory=dict)
    modules: list[ModuleInfo] = field(default_factory=list)
    pickle: PickleInfo | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the document as JSON-ready data."""
        document = dataclasses.asdict(self, dict_factory=lambda pairs: {key.rstrip("_"): item for key, item in pairs})
        return {"schema_version": SCHEMA_VERSION, **_finite(document)}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
