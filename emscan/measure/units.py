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

from emscan.measure.chunks import FIRST, others, pieces, reduce_max, reduce_min, summed, unit_zeros
from emscan.report.document import Components, Thresholds

Derivative = Callable[[Tensor], Tensor]
_scratch = FIRST


def upper_bound(samples: int, confidence: float = 0.95) -> float | None:
    """Return the upper bound on the share of samples that switch a unit on which none of ``samples`` did.

    Exact binomial: the p with (1 - p)^n = 1 - confidence, about 3/n at 95 %.
    """
    return 1 - (1 - confidence) ** (1 / samples) if samples > 0 else None


def compared(tensor: Tensor, threshold: float, *, or_equal: bool = False) -> Tensor:
    """Return 1 where ``tensor`` is above ``threshold``, else 0 (NaN too): float32 scratch, until the next call."""
    compare = torch.ge if or_equal else torch.gt
    return compare(tensor, threshold, out=_scratch.like(tensor))


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
        # comparisons that tell on from off and flat from active; most gates share them
        lows, highs = [(low, True) for low, _ in flat], [(high, False) for _, high in flat]
        self._edges = dict.fromkeys(edge for edge in [(on_above, False), *lows, *highs] if math.isfinite(edge[0]))

    def update_output(self, h: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See outputs of a gate that is on exactly where its output is above 0 (ReLU): on, active and mean at once."""
        gone = others(h, unit_dims)
        on, total = unit_zeros(h, unit_dims), unit_zeros(h, unit_dims)
        for part in pieces(h, unit_dims):
            on += summed(compared(part, 0.0), gone)
            total += summed(part, gone)
        values = h.numel() // len(self.rows)
        active = _counted(on) + self._magnitude(total, h, unit_dims)
        self.on += _counted(on)
        self.active += active
        self.in_flat[0] += values - active
        self.values += values

    def update_signed(self, h: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See outputs of a gate that is flat nowhere and above 0 exactly where it is on (GELU): both counts in one walk."""
        gone = others(h, unit_dims)
        on, total = unit_zeros(h, unit_dims), unit_zeros(h, unit_dims)
        for part in pieces(h, unit_dims):
            on += summed(compared(part, 0.0), gone)
            total += summed(torch.abs(part, out=_scratch.like(part)) if _fits(part) else part.abs(), gone)
        values = h.numel() // len(self.rows)
        self._magnitude(total, h, unit_dims)
        self.on += _counted(on)
        self.active += values
        self.values += values

    def watch_underflow(self, z: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See energies only until every unit is known to pass gradient."""
        for part in pieces(z, unit_dims):
            if self.underflow is None or self.underflow.settled:
                return
            self.underflow.update(part, unit_dims)

    def update_energy(self, z: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See energies: on and active counts, and whether a gate that is flat nowhere underflows."""
        gone = others(z, unit_dims)
        above = {edge: unit_zeros(z, unit_dims) for edge in self._edges}
        sound = True
        for part in pieces(z, unit_dims):
            for (threshold, or_equal), total in above.items():
                total += summed(compared(part, threshold, or_equal=or_equal), gone)
            sound = sound and bool(part.sum(dtype=torch.float32).isfinite())
            if self.underflow is not None:
                self.underflow.update(part, unit_dims)
        values = z.numel() // len(self.rows)
        counts = {edge: _counted(total) for edge, total in above.items()}
        # NaN is on no side and in no flat interval: its derivative is NaN, not 0
        real = values - (torch.zeros_like(self.on) if sound else _nans(z, unit_dims))
        flat = torch.zeros_like(self.on)
        for index, (low, high) in enumerate(self.flat):
            inside = real if low == -math.inf else counts[low, True]
            inside = inside if high == math.inf else inside - counts[high, False]
            self.in_flat[index] += inside
            flat += inside
        self.on += counts[self.on_above, False]
        self.active += values - flat
        self.values += values

    def update_active(self, active: Tensor, on: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See where a gate passes gradient and where it is on (bool tensors), for gates that differ between units."""
        values = active.numel() // len(self.rows)
        found = _counted(_total(active, unit_dims))
        self.on += found if on is active else _counted(_total(on, unit_dims))
        self.active += found
        self.in_flat[0] += values - found
        self.values += values

    def update_magnitude(self, h: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See outputs, for the mean of |h|."""
        gone = others(h, unit_dims)
        total = unit_zeros(h, unit_dims)
        for part in pieces(h, unit_dims):
            total += summed(torch.abs(part, out=_scratch.like(part)) if _fits(part) else part.abs(), gone)
        self._magnitude(total, h, unit_dims)

    def _magnitude(self, total: Tensor, h: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
        """Add sums of |h|, those of finite values only where some are not; return how many NaN every unit had."""
        self.magnitudes += h.numel() // len(self.rows)
        if bool(total.isfinite().all()):
            self.magnitude += total.flatten().cpu()
            return torch.zeros_like(self.on)
        self.nonfinite = self.nonfinite or not bool(h.isfinite().all())
        gone = others(h, unit_dims)
        total = unit_zeros(h, unit_dims)
        for part in pieces(h, unit_dims):
            wide = part.double().abs()
            total += summed(torch.where(wide.isfinite(), wide, 0.0), gone)
        self.magnitude += total.flatten().cpu()
        return _nans(h, unit_dims)

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

    @property
    def settled(self) -> bool:
        """Whether every unit is known to live."""
        return bool(self.alive.all())

    def update(self, z: Tensor, unit_dims: tuple[int, ...]) -> None:
        """See energies: the ends of a unit's range mostly show it alive; where they do not, every value decides."""
        if self.settled:
            return
        ends = torch.stack([reduce_min(z, unit_dims), reduce_max(z, unit_dims)])
        self.alive |= (self._derivative(ends) != 0).any(0)
        left = (~self.alive).nonzero().flatten()
        if len(left):
            rows = z.permute(*unit_dims, *others(z, unit_dims)).reshape(len(self.alive), -1)
            slopes = self._derivative(rows[left.to(z.device)].double()).cpu()
            self.alive[left] |= (slopes != 0).any(1)


def _fits(part: Tensor) -> bool:
    return part.dtype == torch.float32


def _counted(total: Tensor) -> Tensor:
    """Return sums of ones as flat int64 counts on the CPU."""
    return total.flatten().to("cpu", torch.int64)


def _total(flags: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    gone = others(flags, unit_dims)
    total = unit_zeros(flags, unit_dims)
    for part in pieces(flags, unit_dims):
        total += summed(part, gone)
    return total


def _nans(tensor: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    return _counted(_total(tensor.isnan(), unit_dims))
