"""Several sets of K alternatives in one row: codebooks side by side, classes per head, codebooks stacked in one tensor.

Alternative k of one set is not alternative k of another. Which set a competition is over shows in the axes: a second
axis of the scores that runs over the rows of the same weight, or an axis of the table that is left over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from emscan.classify.flow import ancestors
from emscan.classify.owners import owns
from emscan.classify.site import Site
from emscan.measure.layout import Layout, alternatives_last, split
from emscan.trace.axes import Axes
from emscan.trace.graph import Value
from emscan.trace.operators import VIEW
from emscan.trace.origins import Dim, Dims, Factor

_MOST = 1 << 16  # components of all books together; a row with more is counted as if it had one book


@dataclass
class Books:
    """``count`` sets of alternatives; ``only``: the one that a site is over, where each has a site of its own.

    ``layouts``: by number of dimensions, how to view a tensor so that books have axes of their own; with the axis of
    the alternatives there, negative, behind them.
    """

    count: int = 1
    only: int = 0
    layouts: dict[int, tuple[Layout, int]] = field(default_factory=dict)

    def scores(self, tensor: Tensor, axes: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
        """Yield every book and its part of a tensor that has the alternatives along ``axes``, which come last then."""
        found = self.layouts.get(tensor.dim())
        if found is None or not found[0].fits(tensor):
            yield self.only, alternatives_last(tensor, axes)
            return
        layout, axis = found
        for book, part in enumerate(_first(layout, tensor)):
            yield book, part.movedim(axis, -1)

    def choices(self, chosen: Tensor, axis: int, rank: int, kept: int | None) -> Iterator[tuple[int, Tensor, int]]:
        """Yield every book, what was chosen from it, and how many choices each competition made.

        ``axis`` (negative) and ``rank``: of the scores; ``kept``: how many choices count, where more are handed out.
        """
        each = 1
        if chosen.dim() == rank and rank:
            each = chosen.shape[axis]
            if kept is not None and kept < each:
                chosen, each = chosen.narrow(axis, 0, kept), kept
        found = self.layouts.get(chosen.dim())
        if found is None or not found[0].fits(chosen):
            yield self.only, chosen, each
            return
        for book, part in enumerate(_first(found[0], chosen)):
            yield book, part, each


def _first(layout: Layout, tensor: Tensor) -> Tensor:
    """Return the tensor with its books along the first axis."""
    viewed = layout.view(tensor)
    moved = viewed.movedim(layout.unit_dims, tuple(range(len(layout.unit_dims))))
    return moved.flatten(0, len(layout.unit_dims) - 1)


def books_of(site: Site, axes: Axes, known: int | None = None) -> Books:
    """Return the sets of alternatives of one call of a row; one set where no axis tells them apart.

    ``known``: how many sets earlier calls of the row had; a call that has others counts as one set.
    """
    found = _books_of(site, axes)
    return found if known in {None, found.count} else Books()


def _books_of(site: Site, axes: Axes) -> Books:
    dims = axes.of(site.energies)
    if not site.persistent or not site.energies.data or len(site.axes) != 1 or -site.axes[0] > len(dims):
        return Books()
    axis = site.axes[0] % len(dims)
    along = [factor for factor in dims[axis] if factor.origin.persistent]
    rest = [factor for place, dim in enumerate(dims) if place != axis for factor in dim if factor.origin.persistent]
    own = [factor for factor in rest if any(factor.origin == a.origin for a in along)]
    table = _table(site, along)
    if not own and table is not None:
        stacked = _selected(table)
        if stacked is not None:
            return Books(*stacked) if stacked[0] * math.prod(f.size for f in dims[axis]) <= _MOST else Books()
        left = _left_over(axes.of(table), along)
        own = next(([f for f in rest if f.size == size] for size in left if any(f.size == size for f in rest)), [])[:1]
    count = math.prod(factor.size for factor in own)
    if count < 2 or count * math.prod(factor.size for factor in dims[axis]) > _MOST:
        return Books()
    return Books(count, 0, {len(part): _viewed(part, place, own) for part, place in _ranks(dims, axis)})


def _ranks(dims: Dims, axis: int) -> list[tuple[Dims, int | None]]:
    """Return the dimensions with the axis of the alternatives, and without it, as indices of choices have them."""
    return [(dims, axis), ((*dims[:axis], *dims[axis + 1 :]), None)]


def _viewed(dims: Dims, axis: int | None, own: list[Factor]) -> tuple[Layout, int]:
    plain = tuple(() if place == axis else dim for place, dim in enumerate(dims))  # the alternatives stay one axis
    layout = split(plain, lambda factor: any(factor is one for one in own))
    if axis is None:
        return layout, -1
    ends = sum(layout.pattern[: axis + 1])
    behind = sum(place >= ends and place not in layout.unit_dims for place in range(len(layout.shape)))
    return layout, -1 - behind


def _table(site: Site, along: list[Factor]) -> Value | None:
    """Return what holds the alternatives, made of parameters and buffers alone; the one of most axes, where offsets or
    norms that are made of it meet the scores too."""
    names = {factor.origin.name for factor in along}
    calls = [value.call for value in ancestors(site.energies, lambda call: not owns(call)) if value.call is not None]
    operands = [
        v for call in calls if any(v.data for v in call.inputs) for v in call.inputs if not v.data and v.floating
    ]
    tables = [value for value in operands if names & _leaves(value)]
    return max(tables, key=lambda value: len(value.shape), default=None)


def _leaves(value: Value) -> set[str]:
    found, stack = set(), [value]
    while stack:
        item = stack.pop()
        if item.call is None:
            found.add(item.name)
        else:
            stack.extend(item.call.inputs)
    return found


def _selected(table: Value) -> tuple[int, int] | None:
    """Return how many tables a tensor holds and which one was taken from it, by an index that the code gives."""
    value = table
    while value.call is not None and len(value.call.inputs) >= 1:
        call, before = value.call, value.call.inputs[0]
        if call.op == "aten.select" and isinstance(call.arg("index"), int):
            size = before.shape[call.arg("dim", 0)]
            return size, call.arg("index") % size
        if call.op == "aten.unbind":
            return len(call.outputs), value.index
        if call.op not in VIEW:
            return None
        value = before
    return None


def _left_over(dims: Dims, along: list[Factor]) -> list[int]:
    """Return the sizes of the axes of a table that run neither over alternatives nor over what is compared."""
    others = [dim for dim in dims if dim and not _same(dim, along)]
    return [math.prod(factor.size for factor in dim) for dim in others] if len(others) >= 2 else []


def _same(dim: Dim, along: list[Factor]) -> bool:
    return any(a.origin == b.origin and a.step == b.step for a in dim for b in along)
