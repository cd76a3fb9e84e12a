"""One unit's function from its energy to its output, as numbers: limits, slopes, kinks, flat stretches.

The verdict on a gate rests on this curve, however the code spells it. Everything is float64; derivatives are exact
(automatic differentiation), so a flat stretch is a stretch where the derivative is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

_TAIL = 1e3  # |z| from which on a curve counts as having reached its asymptote
_JUMP = 1e-4  # share of the largest slope that a change of slope must exceed to be a kink


def _grid() -> Tensor:
    positive = torch.logspace(-4, 4, 2401, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


class Curve:
    """``function`` sampled on a grid that is logarithmic to both sides of zero (zero itself excluded)."""

    def __init__(self, function: Function, kinked: bool) -> None:
        self.function, self.kinked = function, kinked
        self.z = _grid()
        self.y, self.slope, self.bend = self._derivatives(self.z)
        ok = self.y.isfinite() & self.slope.isfinite()
        self.z, self.y, self.slope, self.bend = (t[ok] for t in (self.z, self.y, self.slope, self.bend))

    def _derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            try:
                z = z.clone().requires_grad_(True)
                y = self._value(z)
                slope = _gradient(y, z)
            except (RuntimeError, NotImplementedError):  # an operator without a derivative
                z = z.detach()
                step = 1e-7 * (z.abs() + 1e-3)
                low, y, high = self._value(z - step), self._value(z), self._value(z + step)
                slope = (high - low) / (2 * step)
            try:
                bend = _gradient(slope, z)
            except (RuntimeError, NotImplementedError):  # no second derivative: hardsigmoid
                bend = torch.gradient(slope.detach(), spacing=(z.detach(),))[0] if len(z) > 2 else torch.zeros_like(z)
        return y.detach(), slope.detach(), bend.detach()

    def _value(self, z: Tensor) -> Tensor:
        y = self.function(z).double()
        return y.expand(z.shape) if y.shape != z.shape else y

    @cached_property
    def usable(self) -> bool:
        """Whether the function is defined on most of both sides."""
        return int((self.z < -1).sum()) > 200 and int((self.z > 1).sum()) > 200

    @cached_property
    def slopes(self) -> tuple[float, float] | None:
        """Slopes far to the left and to the right; None where they do not settle."""
        found = []
        for side in (self.z < 0, self.z > 0):
            z, slope = self.z[side].abs(), self.slope[side]
            reach = min(_TAIL, float(z.max()) / 4)
            tail = slope[z >= reach]
            if not len(tail) or float(tail.max() - tail.min()) > 2e-3 * max(self.steepest, 1e-300):
                return None
            found.append(float(tail.mean()))
        return found[0], found[1]

    @cached_property
    def steepest(self) -> float:
        """Largest |slope| on |z| <= 100."""
        near = self.slope[self.z.abs() <= 100]
        return float(near.abs().max()) if len(near) else 0.0

    @cached_property
    def limits(self) -> tuple[float, float] | None:
        """Values far to the left and to the right; None where they do not settle."""
        found = []
        spread = float(self.y.max() - self.y.min())
        for side in (self.z < 0, self.z > 0):
            z, y = self.z[side].abs(), self.y[side]
            far = y[z >= float(z.max()) / 2]
            if float(far.max() - far.min()) > 1e-2 * spread:
                return None
            found.append(float(y[z.argmax()]))
        return found[0], found[1]

    @cached_property
    def constant(self) -> bool:
        """Whether the output does not depend on the energy."""
        return float(self.y.max() - self.y.min()) == 0.0

    @cached_property
    def stepped(self) -> bool:
        """Whether the output only jumps: its slope is 0 wherever it has one."""
        return self.steepest == 0.0

    @cached_property
    def flat(self) -> list[tuple[float, float]]:
        """Maximal intervals of the grid on which the slope is exactly 0; ends beyond the grid are infinite.

        An exponential tail that underflows far out is not flat: its slope gets there by way of every smaller number.
        """
        if not self.kinked:
            return []
        found = []
        for low, high in _runs(self.z, self.slope == 0):
            beside = ((self.z < low) | (self.z > high)).nonzero().flatten()
            inner = beside[(self.z[beside] - (high if low == -torch.inf else low)).abs().argsort()[:1]]
            far = abs(high if low == -torch.inf else low) > 20 and bool(torch.isinf(torch.tensor([low, high])).any())
            underflow = far and len(inner) and float(self.slope[inner].abs()) < 1e-12 * max(self.steepest, 1e-300)
            if not underflow:
                found.append((low, high))
        return found

    @cached_property
    def two_sided(self) -> bool:
        """Whether the two sides differ as those of a gate do: other slopes, or other limits at slope zero."""
        if self.slopes is None or self.constant:
            return False
        left, right = self.slopes
        scale = max(self.steepest, 1e-300)
        if abs(abs(left) - abs(right)) > 1e-2 * scale:
            return True
        if max(abs(left), abs(right)) > 1e-2 * scale or self.limits is None:
            return False
        low, high = self.limits
        return abs(high - low) > 1e-6 * max(1.0, abs(high), abs(low)) and abs(high - low) > 1e-3 * float(
            self.y.max() - self.y.min()
        )

    @cached_property
    def corners(self) -> list[float]:
        """Places where value or slope jumps, refined by bisection."""
        if not self.kinked:
            return []
        width = self.z[1:] - self.z[:-1]
        scale = max(self.steepest, 1e-300)
        near = self.y[self.z.abs() <= 100]
        spread = max(float(near.max() - near.min()) if len(near) else 0.0, 1e-300)
        # what a smooth curve explains of the change from one point of the grid to the next is no jump
        turn = (self.slope[1:] - self.slope[:-1] - width * (self.bend[1:] + self.bend[:-1]) / 2).abs() / scale
        step = (self.y[1:] - self.y[:-1] - width * (self.slope[1:] + self.slope[:-1]) / 2).abs() / spread
        suspects = torch.maximum(turn, step)
        chosen = suspects.topk(min(64, len(suspects))).indices
        chosen = chosen[suspects[chosen] > _JUMP].sort().values
        if not len(chosen):
            return []
        return self._refine(self.z[chosen].clone(), self.z[chosen + 1].clone(), scale, spread)

    def _refine(self, low: Tensor, high: Tensor, scale: float, spread: float) -> list[float]:
        """Halve every interval towards its larger jump; keep those whose jump does not shrink with the interval."""

        def jumps() -> tuple[Tensor, Tensor]:
            y, slope, _ = self._derivatives(torch.cat([low, high]))
            n = len(low)
            return (slope[n:] - slope[:n]).abs() / scale, (y[n:] - y[:n]).abs() / spread

        parts = torch.linspace(0, 1, 17, dtype=low.dtype)
        for _ in range(12):  # sixteen parts at a time: the function is called seldom
            places = torch.lerp(low[:, None], high[:, None], parts)
            y, slope, _ = self._derivatives(places.flatten())
            y, slope = y.view_as(places), slope.view_as(places)
            chosen = (slope.diff(dim=1).abs() / scale + y.diff(dim=1).abs() / spread).argmax(1, keepdim=True)
            low, high = places.gather(1, chosen)[:, 0], places.gather(1, chosen + 1)[:, 0]
        kink, step = jumps()
        real = (kink > _JUMP) | (step > _JUMP)
        return sorted(((low + high) / 2)[real].tolist())

    @cached_property
    def straight(self) -> bool:
        """Whether a side is exactly a straight line that ends suddenly: a corner of the slope, not of the value."""
        near = (self.z.abs() >= 1e-4) & (self.z.abs() <= 50)
        bend, z = self.bend[near].abs(), self.z[near]
        if not self.kinked or not len(bend) or float(bend.max()) <= 1e-12:
            return False
        still = bend <= 1e-13 * max(float(bend.max()), 1.0)
        for low, high in _runs(z, still):
            if min(high, 50.0) - max(low, -50.0) <= 1.0:
                continue
            outside = bend[((z < low) | (z > high)) & ((z - (low if low > -50 else high)).abs() < 0.3)]
            # an exponential tail also reaches zero, but by way of every smaller number
            if len(outside) and float(outside.min()) > 1e-3 * float(bend.max()):
                return True
        return False

    def same_as(self, function: Function, tolerance: float = 1e-6) -> bool:
        """Whether the curve agrees with ``function`` on [-20, 20], relative to 1 + |z|."""
        near = self.z.abs() <= 20
        z, y = self.z[near], self.y[near]
        return len(z) > 500 and bool(((function(z) - y).abs() <= tolerance * (1 + z.abs())).all())

    def scaled(self, function: Function) -> bool:
        """Whether the curve is a ``function``, up to scale and shift of the output, on [-20, 20]."""
        near = self.z.abs() <= 20
        z, y = self.z[near], self.y[near]
        if len(z) <= 500:
            return False
        design = torch.stack([function(z), torch.ones_like(z)], 1)
        solution = torch.linalg.lstsq(design, y[:, None]).solution
        fits = bool(((design @ solution)[:, 0] - y).abs().max() <= 1e-6 * (1 + y.abs().max()))
        return fits and abs(float(solution[0])) > 1e-12


def _gradient(y: Tensor, z: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(z)
    (gradient,) = torch.autograd.grad(y.sum(), z, create_graph=True, allow_unused=True)
    return torch.zeros_like(z) if gradient is None else gradient


def _runs(z: Tensor, wanted: Tensor) -> list[tuple[float, float]]:
    """Return the stretches of ``z`` where ``wanted`` holds for at least three neighbours."""
    found: list[tuple[float, float]] = []
    start: int | None = None
    flags = wanted.tolist()
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            if index - start >= 3:
                low = -torch.inf if start == 0 else float(z[start])
                high = torch.inf if index == len(flags) else float(z[index - 1])
                found.append((low, high))
            start = None
    return found
