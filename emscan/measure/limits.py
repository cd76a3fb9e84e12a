"""How much is kept in memory at most: components and heads, in one row and in all, and the number of measured rows.

A row beyond a limit is left unmeasured and says so; its verdict and its evidence stand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from emscan.classify.site import Site
from emscan.trace.axes import Axes
from emscan.trace.origins import Dims

IN_ONE_ROW = 1 << 22  # components: units, persistent alternatives, heads; each takes up to about 150 bytes
IN_ALL_ROWS = 1 << 25
ROWS = 1 << 14  # histograms of a row take up to a quarter of a megabyte


@dataclass
class Room:
    """What is left for further rows."""

    components: int = 0
    rows: int = 0

    def refuses(self, site: Site, axes: Axes) -> str | None:
        """Count a row that looks like ``site``, or return why there is no room for it."""
        count = components_of(site, axes)
        if count > IN_ONE_ROW:
            return f"not measured: {count:,} components, more than the {IN_ONE_ROW:,} that are kept of one row"
        if self.components + count > IN_ALL_ROWS:
            return f"not measured: with its {count:,} components there would be more than the {IN_ALL_ROWS:,} that are kept"
        if self.rows >= ROWS:
            return f"not measured: there are {ROWS:,} measured rows already"
        self.components, self.rows = self.components + count, self.rows + 1
        return None


def components_of(site: Site, axes: Axes) -> int:
    """Return about how many units, persistent alternatives or heads the accumulator of a row follows one by one."""
    dims = axes.of(site.energies)
    if site.form is not None or site.mechanism in {"threshold", "smooth-gate", "logistic"}:
        return max(_units(dims, site.owner_names), _units(axes.of(site.emitted), site.owner_names))
    if site.persistent:
        return site.count or 0
    if site.attention is not None or site.kind == "keys":
        taken = {axis % len(dims) for axis in site.axes} if dims else set()
        heads = [dim for d, dim in enumerate(dims) if d not in taken and dim and all(f.origin.persistent for f in dim)]
        return math.prod(factor.size for dim in heads for factor in dim)
    return 0


def _units(dims: Dims, names: tuple[str, ...]) -> int:
    """Rows of the owner's parameter among the dimensions; the size of the last one where there are none."""
    sizes: dict[tuple[str, int], int] = defaultdict(lambda: 1)
    for factor in (factor for dim in dims for factor in dim if factor.origin.name in names):
        sizes[factor.origin.name, factor.origin.dim] *= factor.size
    if sizes:
        return max(sizes.values())
    return math.prod(factor.size for factor in dims[-1]) if dims else 1
