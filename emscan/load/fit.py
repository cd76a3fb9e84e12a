"""Fits a state_dict to an architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emscan.load.source import RefusalError, listing, printable
from emscan.load.weights import in_order, strip_prefixes
from emscan.report.document import Misfit, Mismatch

_HINT = "name the architecture that they were saved from with --model, or pass --partial to audit what fits"


def fit(
    module: nn.Module, weights: dict[str, Tensor], target: str, *, partial: bool = False
) -> tuple[list[str], Misfit | None]:
    """Load ``weights`` into ``module``; return notes, and what did not fit where ``partial`` allows that.

    Raises RefusalError where they do not fit: tensors missing, left over or of another shape; with ``partial`` where
    none fits.
    """
    wanted = module.state_dict()
    found, notes = _renamed(weights, wanted)
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in wanted.items() if not is_lazy(tensor)}
    clashes = [name for name, tensor in found.items() if shapes.get(name, tensor.shape) != tensor.shape]
    fitting = {name: tensor for name, tensor in found.items() if name not in clashes}
    try:
        result = module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # a module's own way to load: what fits is for it to say
        raise RefusalError(f"its weights do not fit {printable(target)}: {printable(error)}", _HINT) from None
    missing = [name for name in result.missing_keys if name not in clashes]
    misfit = Misfit(
        len(fitting) - len(result.unexpected_keys), missing, list(result.unexpected_keys),
        [Mismatch(name, list(found[name].shape), list(wanted[name].shape)) for name in clashes],
    )  # fmt: skip
    if not (missing or misfit.unexpected or clashes):
        return notes + _cast_note(found, wanted), None
    said = describe(misfit)
    if not partial:
        raise RefusalError(f"its weights do not fit {printable(target)}: {said}", _HINT)
    if not misfit.loaded:
        raise RefusalError(f"none of its weights fits {printable(target)}: {said}", "name another architecture")
    return [*notes, f"with --partial, {misfit.loaded} tensors were loaded; {said}", *_cast_note(found, wanted)], misfit


def describe(misfit: Misfit) -> str:
    """Return what does not fit, in words: numbers and the first names."""
    named = {"missing": misfit.missing, "unexpected": misfit.unexpected}
    parts = [f"{len(names)} {what} ({listing(names)})" for what, names in named.items() if names]
    if misfit.mismatched:
        first = misfit.mismatched[0]
        detail = f"{first.name}: {tuple(first.file)} in the file, {tuple(first.model)} in the model"
        more = ", ..." if len(misfit.mismatched) > 1 else ""
        parts.append(f"{len(misfit.mismatched)} of another shape ({printable(detail)}{more})")
    return ", ".join(parts)


def _renamed(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under the architecture's names: as they are, without wrappers' prefixes, or a part of them."""
    stripped, notes = strip_prefixes(weights)
    if len(weights.keys() & wanted.keys()) >= len(stripped.keys() & wanted.keys()):
        stripped, notes = weights, []
    if not wanted or stripped.keys() & wanted.keys():
        return stripped, notes
    places = _places(weights, wanted)
    if not places:
        return in_order(stripped, wanted) or (stripped, notes)
    if len(places) > 1:
        raise RefusalError(
            f"the architecture's weights are in it {len(places)} times, under {listing(places)}", "save one of them"
        )
    inside = {name.removeprefix(places[0]): tensor for name, tensor in weights.items() if name.startswith(places[0])}
    notes = [f"the architecture's weights were found under {places[0]!r}"]
    beside = [name for name in weights if not name.startswith(places[0])]
    return inside, [*notes, *([f"tensors beside them were left out: {listing(beside)}"] if beside else [])]


def _places(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes under which every tensor of the architecture is found, in its shape."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]
    return [
        prefix
        for prefix in prefixes
        if all(
            prefix + name in weights and (is_lazy(tensor) or weights[prefix + name].shape == tensor.shape)
            for name, tensor in wanted.items()
        )
    ]


def _cast_note(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    pairs = {(tensor.dtype, wanted[name].dtype) for name, tensor in weights.items() if name in wanted}
    return [f"weights were converted from {old} to {new}" for old, new in sorted(pairs, key=str) if old != new]
