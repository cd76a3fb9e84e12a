"""Fits a state_dict to an architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emscan.load.source import RefusalError, listing, printable
from emscan.load.weights import strip_prefixes


def fit(module: nn.Module, weights: dict[str, Tensor], target: str) -> list[str]:
    """Load ``weights`` strictly into ``module``; returns notes, raises RefusalError where they do not fit."""
    stripped, notes = strip_prefixes(weights)
    wanted = module.state_dict()
    if len(weights.keys() & wanted.keys()) >= len(stripped.keys() & wanted.keys()):
        stripped, notes = weights, []
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in wanted.items() if not is_lazy(tensor)}
    clashes = [name for name, tensor in stripped.items() if shapes.get(name, tensor.shape) != tensor.shape]
    missing, unexpected, failure = [*wanted], [*stripped], ""
    try:
        result = module.load_state_dict(stripped, strict=False)
        missing, unexpected = result.missing_keys, result.unexpected_keys
    except RuntimeError as error:  # shapes that clash; the names are compared here
        missing = [name for name in wanted if name not in stripped]
        unexpected = [name for name in stripped if name not in wanted]
        failure = "" if clashes else printable(error)
    misfits = {"missing": missing, "unexpected": unexpected}
    parts = [f"{len(names)} {what} ({listing(names)})" for what, names in misfits.items() if names]
    if clashes:
        first = clashes[0]
        detail = f"{first}: {_shape(stripped[first])} in the file, {_shape(wanted[first])} in the model"
        parts.append(f"{len(clashes)} of another shape ({printable(detail)}{', ...' if len(clashes) > 1 else ''})")
    if parts or failure:
        raise RefusalError(
            f"its weights do not fit {printable(target)}: {', '.join(parts) or failure}",
            "name the architecture that they were saved from with --model",
        )
    return notes + _cast_note(stripped, wanted)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _cast_note(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    pairs = {(tensor.dtype, wanted[name].dtype) for name, tensor in weights.items() if name in wanted}
    return [f"weights were converted from {old} to {new}" for old, new in sorted(pairs, key=str) if old != new]
