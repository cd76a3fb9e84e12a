"""Arguments of `emscan trend` -> checkpoints: files, patterns, the folders that Lightning and transformers write."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emscan.compare.sources import is_report, reports_of
from emscan.errors import UsageError

_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".safetensors"})
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|optim).*", re.IGNORECASE)
_DESCRIBES = (
    "config.json",
    "modules.json",
    ".metadata",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_WHAT = "give files, a pattern in quotes, or the folder of a run"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint or a saved report; ``name``: where its step may stand; ``place``: of several reports in a file."""

    path: str
    name: str
    place: int = 0
    report: bool = False


def expanded(arguments: Sequence[str], note: Note) -> list[Candidate]:
    """Return the checkpoints that the arguments name, each once. Raises UsageError for one that names none."""
    paths: dict[Path, str] = {}
    for argument in arguments:
        for path in _paths(argument, note):
            place = Path(path).resolve() if path != "-" else Path("-")
            if place in paths and paths[place] != path:
                note(f"{path} is the same file as {paths[place]}: it is taken once")
            paths.setdefault(place, path)
    found = [candidate for path in paths.values() for candidate in _candidates(path, note)]
    if len(found) < 2:
        only = f"one checkpoint ({found[0].path})" if found else "no checkpoint"
        raise UsageError(f"a trend needs two checkpoints or more, this is {only}", _WHAT)
    return found


def _candidates(path: str, note: Note) -> Iterator[Candidate]:
    """Yield one candidate, or one for every report of a file."""
    if not is_report(path):
        yield Candidate(path, path)
        return
    if re.search(r"\d", Path(path).stem) and not _is_array(path):
        yield Candidate(path, path, report=True)
        return
    for place, report in enumerate(reports_of(path, note)):
        yield Candidate(path, report.model.path or path, place, report=True)


def _is_array(path: str) -> bool:
    if path == "-":
        return True
    with Path(path).open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def _paths(argument: str, note: Note) -> list[str]:
    if argument == "-":
        return [argument]
    if Path(argument).is_dir():
        return _folder(Path(argument), note)
    if Path(argument).exists():
        return [argument]
    if any(character in argument for character in "*?["):
        found = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - absolute patterns, too
        if not found:
            raise UsageError(f"{argument}: the pattern matches nothing", _WHAT)
        return found
    raise UsageError(f"{argument}: no such file or folder", _WHAT)


def _folder(folder: Path, note: Note) -> list[str]:
    """Return the checkpoints in a run's folder; a folder that is one checkpoint stands for itself."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}", "check its rights") from None
    steps = [path for path in inside if path.is_dir() and re.fullmatch(r"checkpoint[-_]\d+", path.name)]
    if steps:
        if _is_checkpoint(folder):
            note(f"{folder}: its checkpoints are taken, the model beside them is not")
        return [str(path) for path in steps]
    if (folder / "lightning_logs").is_dir():
        return _folder(folder / "lightning_logs", note)
    versions = [path for path in inside if path.is_dir() and re.fullmatch(r"version_\d+", path.name)]
    if versions:
        last = max(versions, key=lambda path: int(path.name.partition("_")[2]))
        if len(versions) > 1:
            note(f"{folder}: of {len(versions)} runs the last is taken, {last.name}")
        return _folder(last, note)
    if (folder / "checkpoints").is_dir():
        return _folder(folder / "checkpoints", note)
    if _is_checkpoint(folder):
        return [str(folder)]
    return _plain(folder, inside)


def _plain(folder: Path, inside: Sequence[Path]) -> list[str]:
    """Return the files, else the folders, of a folder that are checkpoints, else its reports."""
    files = [path for path in inside if path.is_file() and path.suffix.lower() in _SUFFIXES]
    files = [path for path in files if not _TRAINING.fullmatch(path.name)]
    folders = [path for path in inside if path.is_dir() and _is_checkpoint(path)]
    found = files or folders or [path for path in inside if path.suffix == ".json" and is_report(str(path))]
    if not found:
        raise UsageError(f"{folder}: no checkpoints in it", _WHAT)
    return [str(path) for path in found]


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is itself a saved model."""
    return any((folder / name).exists() for name in _DESCRIBES)
