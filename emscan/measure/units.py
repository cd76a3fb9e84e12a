"""Units of a gate: which are on, how often, and which get no gradient on any value of the probe.

A unit is dead if the derivative through its gate is exactly 0 on every value: its energy never left the flat
intervals of the gate. On-values are counted exactly by comparing into a float32 scratch that stays in cache and
summing it; such a sum of ones is exact up to 2^24, and a piece is far smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from emscan.measure.chunks import Scratch, pieces, reduce_max, reduce_min, reduce_sum
from emscan.report.document import Components, Thresholds

Derivative = Callable[[Tensor], Tensor]
_scratch = Scratch()


def upper_bound(samples: int, confidence: float = 0.95) -> float | None:
    """Return the upper bound on the share of samples that switch a unit on which none of ``samples`` did.

    Exact binomial: the p with (1 - p)^n = 1 - confidence, about 3/n at 95 %.
    """
    return 1 - (1 - confidence) ** (1 / samples) if samples > 0 else None


def count_above(tensor: Tensor, threshold: float, unit_dims: tuple[int, ...], *, or_equal: bool = False) -> Tensor:
    """Count, per unit, the entries above ``threshold``; int64 on the CPU."""
    buffer = _scratch.like(tensor)
    compare = torch.ge if or_equal else torch.gt
    compare(tensor, threshold, out=buffer)
    return reduce_sum(buffer, unit_dims).to(torch.int64)


class GateUnits:
    """Counts per unit of one gate. ``rows``: the unit's row in the owner's weight, in the order of the unit axes.

    ``on_above``: on is energy > on_above. ``flat``: closed intervals of energies with derivative exactly 0, ``stuck``
    the output on each; ``None`` for gates that are flat nowhere.
    """

    def __init__(
        self,
        rows: tuple[int, ...],
        on_above: float = 0.0,
        flat: tuple[tuple[float, float], ...] = (),
        stuck: tuple[float, ...] = (),
        derivative: Derivative | None = None,
    ) -> None:
        count = len(rows)
        self.rows, self.on_above, self.flat, self.stuck = rows, on_above, flat, stuck
        self.values = 0  # energies seen per unit
        self.on = torch.zeros(count, dtype=torch.int64)
        self.active = torch.zeros(count, dtype=torch.int64)
        self.in_flat = torch.zeros(max(1, len(flat)), count, dtype=torch.int64)
        self.magnitude = torch.zeros(count, dtype=torch.float64)
        self.magnitudes = 0
        self.underflow = Underflow(count, derivative) if derivative is not None else None
        self.nonfinite = False

    def update_output(self, h: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See outputs of a gate that is on exactly where its output is above 0 (ReLU): on, active and mean at once."""
        for part in pieces(h, unit_dims):
            on = count_above(part, 0.0, unit_dims)
            self.on += on
            self.active += on
            self.in_flat[0] += part.numel() // len(self.rows) - on
            self._magnitude(reduce_sum(part, unit_dims), part)
            self.values += part.numel() // len(self.rows)

    def update_energy(self, z: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See energies: on and active counts, and whether a gate that is flat nowhere underflows."""
        for part in pieces(z, unit_dims):
            count = part.numel() // len(self.rows)
            self.on += count_above(part, self.on_above, unit_dims)
            flat = torch.zeros_like(self.on)
            for index, (low, high) in enumerate(self.flat):
                inside = _inside(part, low, high, unit_dims, count)
                self.in_flat[index] += inside
                flat += inside
            self.active += count - flat
            self.values += count
            if self.underflow is not None:
                self.underflow.update(part, unit_dims)

    def update_active(self, active: Tensor, on: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See where a gate passes gradient and where it is on, for gates that differ from unit to unit (bool tensors)."""
        self.on += reduce_sum(on, unit_dims).to(torch.int64)
        found = reduce_sum(active, unit_dims).to(torch.int64)
        self.active += found
        self.in_flat[0] += active.numel() // len(self.rows) - found
        self.values += active.numel() // len(self.rows)

    def update_magnitude(self, h: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See outputs, for the mean of |h|."""
        for part in pieces(h, unit_dims):
            buffer = _scratch.like(part)
            self._magnitude(reduce_sum(torch.abs(part, out=buffer) if _fits(part) else part.abs(), unit_dims), part)

    def _magnitude(self, total: Tensor, part: Tensor) -> None:
        self.nonfinite = self.nonfinite or not bool(total.isfinite().all())
        self.magnitude += total
        self.magnitudes += part.numel() // len(self.rows)

    def merge(self, other: GateUnits) -> None:
        """Add what another probe shard has shown."""
        self.values += other.values
        self.magnitudes += other.magnitudes
        for mine, theirs in ((self.on, other.on), (self.active, other.active), (self.in_flat, other.in_flat)):
            mine += theirs
        self.magnitude += other.magnitude
        if self.underflow is not None and other.underflow is not None:
            self.underflow.alive |= other.underflow.alive
        self.nonfinite = self.nonfinite or other.nonfinite

    def components(self, thresholds: Thresholds, samples: int) -> Components:
        """Return the lists of the report; ``samples``: how many the probe had, for the bound on what was never seen."""
        seen = self.values > 0
        numeric = torch.zeros(len(self.rows), dtype=torch.bool)
        dead = (self.active == 0) & seen if self.flat else numeric
        if self.underflow is not None:
            dead = numeric = ~self.underflow.alive & seen
        on_rate = self.on.double() / max(1, self.values)
        rare = (on_rate < thresholds.rare) & ~dead & seen
        mean = self.magnitude / max(1, self.magnitudes)
        layer = float(mean.mean())
        dormant = (mean <= thresholds.dormant * layer) & ~dead & ~rare & (self.magnitudes > 0)
        linear = (self.on == self.values) & (self.active == self.values) & seen
        order = torch.tensor(self.rows).argsort()
        rows = torch.tensor(self.rows)[order]
        stuck = self._stuck(dead)

        def listed(flags: Tensor) -> list[int]:
            return rows[flags[order]].tolist()

        never_on = bool((self.on == 0).any()) and seen
        return Components(
            "units",
            len(self.rows),
            dead=listed(dead),
            rare=listed(rare),
            dormant=listed(dormant),
            linear=listed(linear & ~dead),
            numeric=bool(numeric.any()),
            stuck_at=[stuck[i] for i in order[dead[order]].tolist()] if any(stuck.values()) else None,
            on_rate=on_rate[order].tolist() if seen else None,
            upper_bound=upper_bound(samples, thresholds.confidence) if never_on else None,
        )

    def _stuck(self, dead: Tensor) -> dict[int, float | None]:
        """Return the one output each dead unit gives; None where it moves between two flat stretches."""
        found: dict[int, float | None] = {}
        for i in dead.nonzero().flatten().tolist():
            visited = [s for s, n in zip(self.stuck, self.in_flat[:, i].tolist(), strict=False) if n]
            found[i] = visited[0] if len(visited) == 1 else None
        return found


class Underflow:
    """Units of a gate that is flat nowhere: alive once one value has a derivative that is not exactly 0.

    ``derivative``: the gate's, in the model's dtype. Looks only until every unit is known to live, which in a sound
    network is after the first piece.
    """

    def __init__(self, count: int, derivative: Derivative) -> None:
        self.alive = torch.zeros(count, dtype=torch.bool)
        self._derivative = derivative

    def update(self, z: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See energies: slopes at the ends of each unit's range here and at its value nearest to 0 decide."""
        if bool(self.alive.all()):
            return
        low, high = reduce_min(z, unit_dims), reduce_max(z, unit_dims)
        near = reduce_min(z.abs(), unit_dims)
        at = torch.stack([low, high, torch.where(high < 0, -near, near), torch.where(low > 0, near, -near)])
        slopes = self._derivative(torch.nan_to_num(at))
        self.alive |= (slopes != 0).any(0)


def _fits(part: Tensor) -> bool:
    return part.dtype == torch.float32


def _inside(part: Tensor, low: float, high: float, unit_dims: tuple[int, ...], count: int) -> Tensor:
    if math.isinf(low):
        # not the complement of "above": NaN is on no side, and no evidence of life either
        return count - count_above(part, high, unit_dims)
    from_low = count_above(part, low, unit_dims, or_equal=True)
    return from_low if math.isinf(high) else from_low - count_above(part, high, unit_dims)
