"""How to audit what was inspected: the command line, or why there is none."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from emscan.inspect.document import AuditInfo
from emscan.inspect.part import Part
from emscan.load.source import UnsafeError
from emscan.load.suggest import command

_WEIGHTS = "it holds weights and no architecture: name that with --model"
_EXTRA = "its architecture is in transformers: pip install 'emscan[transformers]'"


def advise(path: str, part: Part) -> AuditInfo:
    """Return whether and how `emscan audit` takes the file or folder at ``path``."""
    refusal = part.refusal
    if refusal is not None and not isinstance(refusal, UnsafeError):
        return AuditInfo(False, reason=f"{refusal.reason}; {refusal.hint}" if refusal.hint else refusal.reason)
    if part.format == "transformers":
        return _transformers(path, part)
    if part.format == "sentence-transformers" and refusal is None and not _installed():
        return AuditInfo(True, False, f"emscan audit {shlex.quote(path)}", _EXTRA)
    line = f"emscan audit {shlex.quote(path)}" if part.whole else command(path, [one.info.name for one in part.entries])
    reason = None if part.whole else _WEIGHTS
    if refusal is None:
        return AuditInfo(True, False, line, reason)
    if part.tensors_only:
        given = command(path, [one.info.name for one in part.entries])
        why = f"{refusal.reason}: with --model only its tensors are taken; --trust, in place of it, would run its code"
        return AuditInfo(True, False, given, why)
    why = refusal.reason
    return AuditInfo(True, True, f"{line} --trust", f"{why}; {reason}" if reason else why)


def _transformers(path: str, part: Part) -> AuditInfo:
    """Return the advice for a Hugging Face model: the class comes from transformers, or from code in the folder."""
    place = path
    reason = None if _installed() else _EXTRA
    method = part.metadata.get("quantization")
    if method is not None:
        place = str(Path(path) / "config.json") if part.entries else path
        reason = f"its weights are quantized ({method}): its configuration tells the structure only"
    own = bool(part.metadata.get("auto_map")) and not _known(part.metadata.get("model_type"))
    if own:
        reason = "its architecture is Python code of its own (auto_map), which only --trust lets run"
    if isinstance(part.refusal, UnsafeError):
        own, reason = True, part.refusal.reason
    line = f"emscan audit {shlex.quote(place)}{' --trust' if own else ''}"
    return AuditInfo(True, own, line, reason)


def _installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _known(model_type: object) -> bool:
    """Whether the installed transformers has a folder for the type of model; nothing of it is imported."""
    found = importlib.util.find_spec("transformers")
    name = str(model_type).replace("-", "_")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return name.isidentifier() and any((Path(place) / "models" / name).is_dir() for place in places)
