"""Which row of one report is which row of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from emscan.report.document import Layer

Key = tuple[str, str, int]  # name, composition, and which of the rows that share them


def keyed(layers: Iterable[Layer]) -> dict[Key, Layer]:
    """Return rows by what they are called and composed of; of rows alike in that, the order tells."""
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[Key, Layer] = {}
    for layer in layers:
        alike = (layer.name, layer.composition)
        found[(*alike, seen[alike])] = layer
        seen[alike] += 1
    return found


def matched(
    old: Iterable[Layer], new: Iterable[Layer]
) -> tuple[list[tuple[Layer, Layer]], list[Layer], list[Layer]]:  # fmt: skip
    """Return the pairs in the new order, the rows that only the old report has, and those that only the new one has.

    Rows match by name and composition. What is left over matches by name alone, where both reports have as many rows of
    that name left: there the composition changed. A renamed layer is one that went and one that came.
    """
    before, after = keyed(old), keyed(new)
    pairs = {id(layer): (before[key], layer) for key, layer in after.items() if key in before}
    gone = _by_name(layer for key, layer in before.items() if key not in after)
    come = _by_name(layer for key, layer in after.items() if key not in before)
    for name, layers in come.items():
        if len(layers) == len(gone.get(name, ())):
            pairs |= {id(layer): (was, layer) for was, layer in zip(gone.pop(name), layers, strict=True)}
    ordered = [pairs[id(layer)] for layer in after.values() if id(layer) in pairs]
    return (
        ordered,
        [layer for layers in gone.values() for layer in layers],
        [layer for layer in after.values() if id(layer) not in pairs],
    )


def _by_name(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.name, []).append(layer)
    return found
