"""Where a finding is shown: the user's own line of code that runs the layer, else the checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from urllib.parse import quote

from emscan.report.base import Setting
from emscan.report.document import Finding, Layer, Report
from emscan.report.phrases import printable

_FOREIGN = {"site-packages", "dist-packages", ".venv", "venv", "node_modules"}  # installed, nobody edits it there
_URI_SAFE = "/-._~!$&'()*+,;=@"  # of a path segment; ":" too, but not in the first one of a relative reference


@dataclass(frozen=True)
class Place:
    """A file, relative to the root where it lies below it (``inside``), else absolute; ``line`` counts from 1."""

    path: str
    inside: bool
    line: int | None = None

    @property
    def uri(self) -> str:
        """The path as a URI reference: relative, or with the scheme "file"."""
        if self.inside:
            return _quoted(self.path)
        return f"file://{'' if self.path.startswith('/') else '/'}{_quoted(self.path)}"


def model_place(report: Report, setting: Setting) -> Place:
    """Return the checkpoint's place; a live module has none but what it is called."""
    return path_place(report.model.path, setting) if report.model.path else Place(named(report), True)


def path_place(path: str, setting: Setting) -> Place:
    """Return the place of a file whose path is absolute or starts from the setting's folder."""
    # not Path.resolve, which follows links that the user sees by name, and stumbles over a zero byte
    return _place(path, os.path.abspath(setting.folder), _root(setting))  # noqa: PTH100


@lru_cache(1024)
def _place(path: str, folder: str, root: str) -> Place:
    whole = os.path.normpath(os.path.join(folder, path))  # noqa: PTH118
    for base, file in ((root, whole), (_real(root), _real(whole))):
        below = base.rstrip(os.sep) + os.sep
        if file == base:
            return Place(".", True)
        if file.startswith(below):
            return Place(PurePath(file.removeprefix(below)).as_posix(), True)
    return Place(PurePath(whole).as_posix(), False)


def root_uri(setting: Setting) -> str:
    """Return the URI of what relative ones start from."""
    return Place(PurePath(_root(setting)).as_posix(), False).uri.rstrip("/") + "/"


def place(layer: Layer | None, report: Report, setting: Setting) -> Place:
    """Return where a finding is shown: the line of code that runs its layer, where that is the user's own, or the file."""
    return source_place(layer, setting) or model_place(report, setting)


def source_place(layer: Layer | None, setting: Setting) -> Place | None:
    """Return the line that runs a layer, if it is below the root and not of an installed package."""
    source = layer.source or (layer.evidence.source if layer.evidence is not None else None) if layer else None
    found = re.fullmatch(r"(.+):([1-9][0-9]{0,8})", source or "", re.DOTALL)
    if found is None:
        return None
    where = path_place(found[1], setting)
    if not where.inside or _FOREIGN & set(where.path.split("/")):
        return None
    return Place(where.path, True, int(found[2]))


def layers_by_index(report: Report) -> dict[int, Layer]:
    """Return the rows by index."""
    return {layer.index: layer for layer in report.layers}


def sentence(finding: Finding) -> str:
    """Return what a finding says, and what to do."""
    said = finding.message or finding.rule
    return f"{said}. To do: {finding.help}" if finding.help else said


def named(report: Report) -> str:
    """Return what to call a model."""
    return printable(report.model.path or "model")


def clipped(text: str, most: int) -> str:
    """Return text in one line that steers nothing, of at most ``most`` characters."""
    text = printable(text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _root(setting: Setting) -> str:
    return os.path.abspath(setting.root if setting.root is not None else setting.folder)  # noqa: PTH100


def _quoted(path: str) -> str:
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair, from a report that came from elsewhere
        data = path.encode("utf-8", "surrogatepass")
    return quote(data, safe=_URI_SAFE)


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return path
