"""Which entries of a tensor belong to which unit: rows of the owner's weight, wherever reshapes have moved them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from emscan.trace.origins import Dim, Dims, Factor


@dataclass(frozen=True)
class Layout:
    """How to view a tensor so that every axis is either units or everything else.

    ``shape``: the view's sizes, None where the size may differ from batch to batch (at most one per dimension of the
    tensor); ``pattern``: number of view axes per dimension; ``unit_dims``: view axes that index units, row-major;
    ``rows``: for every unit in that order, its row in the owner's weight.
    """

    shape: tuple[int | None, ...]
    pattern: tuple[int, ...]
    unit_dims: tuple[int, ...]
    rows: tuple[int, ...]

    def view(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` with one axis per entry of ``shape``."""
        if all(width == 1 for width in self.pattern):
            return tensor
        sizes: list[int] = []
        place = 0
        for dim, width in enumerate(self.pattern):
            part = self.shape[place : place + width]
            fixed = math.prod(size for size in part if size is not None)
            sizes += [tensor.shape[dim] // fixed if size is None else size for size in part]
            place += width
        return tensor.reshape(sizes)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor, perhaps of another batch, has as many units as this layout."""
        place = 0
        for dim, width in enumerate(self.pattern):
            part = self.shape[place : place + width]
            fixed = math.prod(size for size in part if size is not None)
            if tensor.shape[dim] % max(1, fixed) or (None not in part and tensor.shape[dim] != fixed):
                return False
            place += width
        return True

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.rows)


def layout_of(dims: Dims, owner_names: tuple[str, ...], fallback: int = -1) -> Layout:
    """Return the layout of a value with these dimensions; units are the rows of the first-named parameter found there.

    ``fallback``: the dimension that indexes units where no parameter of the owner does (a norm on raw channels).
    """
    origin = _unit_origin(dims, owner_names)
    if origin is None:
        tied = [d for d, dim in enumerate(dims) if any(f.origin.kind == "param" for f in dim)]
        return _by_position(dims, tied[0] if len(tied) == 1 else fallback)
    return split(dims, lambda factor: _spot(factor) == origin)


def split(dims: Dims, is_unit: Callable[[Factor], bool]) -> Layout:
    """Return the layout in which the factors that ``is_unit`` names are the units."""
    shape: list[int | None] = []
    pattern: list[int] = []
    units: list[tuple[int, Factor]] = []
    for dim in dims:
        start = len(shape)
        for factor in dim:
            if is_unit(factor):
                units.append((len(shape), factor))
                shape.append(factor.size)
            elif len(shape) > start and shape[-1] is None:
                continue  # neighbours that are no units need no axes of their own
            else:
                shape.append(factor.size if any(size is None for size in shape[start:]) else None)
        if len(shape) == start:
            shape.append(None)
        pattern.append(len(shape) - start)
    rows = [0]
    for _, factor in units:
        rows = [row + factor.start + factor.step * i for row in rows for i in range(factor.size)]
    return Layout(tuple(shape), tuple(pattern), tuple(axis for axis, _ in units), tuple(rows))


def _spot(factor: Factor) -> tuple[str, int]:
    return factor.origin.name, factor.origin.dim


def _unit_origin(dims: Dims, names: tuple[str, ...]) -> tuple[str, int] | None:
    sizes: dict[tuple[str, int], int] = {}
    for factor in itertools.chain.from_iterable(dims):
        if factor.origin.kind in {"param", "buffer"} and factor.origin.name in names:
            sizes[_spot(factor)] = sizes.get(_spot(factor), 1) * factor.size
    return max(sizes, key=lambda spot: sizes[spot]) if sizes else None


def _by_position(dims: Dims, fallback: int) -> Layout:
    rank = len(dims)
    if rank == 0:
        return Layout((), (), (), (0,))
    axis = fallback % rank
    size = _size(dims[axis])
    shape = tuple(size if d == axis else None for d in range(rank))
    return Layout(shape, (1,) * rank, (axis,), tuple(range(size)))


def _size(dim: Dim) -> int:
    return math.prod(factor.size for factor in dim)


def alternatives_last(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the tensor with the axes of the alternatives merged into the last one."""
    rank = tensor.dim()
    wanted = sorted(axis % rank for axis in axes)
    moved = tensor.movedim(wanted, list(range(rank - len(wanted), rank)))
    return moved.flatten(rank - len(wanted)) if len(wanted) > 1 else moved
