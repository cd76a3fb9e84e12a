"""From gate sites to accumulators: which tensors to watch, and what the row then says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emscan.classify.ranges import range_of
from emscan.classify.regions import Region
from emscan.classify.site import GateForm, Site
from emscan.measure import recurrent
from emscan.measure.layout import Layout, layout_of
from emscan.measure.provable import provably_dead
from emscan.measure.two_way import TwoWay, underflow
from emscan.measure.units import GateUnits
from emscan.report.document import Components, Responsibility, Thresholds
from emscan.trace.axes import Axes
from emscan.trace.follow import Taps
from emscan.trace.graph import Value
from emscan.trace.operators import RECURRENT, VIEW

_CHANNELS_FIRST = frozenset({"aten.batch_norm", "aten.group_norm", "aten.instance_norm"})


def unit_layout(value: Value, site: Site, axes: Axes) -> Layout:
    """Return the layout of a value at a gate: units are rows of the owner's weight, else channels or features."""
    first = site.owner is not None and site.owner.op in _CHANNELS_FIRST
    return layout_of(axes.of(value), site.owner_names, 1 if first and len(value.shape) > 1 else -1)


class _Watching:
    """Hears values whose units are those of a layout; ``uneven`` once a value has others: they have no identity then."""

    uneven = False

    def _if_even(self, layout: Layout, listen: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def hear(value: Tensor) -> None:
            if layout.fits(value):
                listen(value)
            else:
                self.uneven = True

        return hear


class GateMeter(_Watching):
    """Threshold and smooth gates."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site, self._thresholds = site, thresholds
        self._units: GateUnits | None = None

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        form = site.form
        assert form is not None
        if site.op in RECURRENT:
            taps.on_call(_only_member_key(site), (id(self), "call"), lambda named, _: self._recurrent(site, named))
            return
        layout = unit_layout(site.emitted, site, axes)
        units = self._accumulator(layout.rows, form)
        hard = site.mechanism == "threshold"
        if not site.emitted.floating or (hard and form.output_tells and form.scalar):
            taps.on_value(
                site.emitted.key,
                (id(self), "output"),
                self._if_even(layout, lambda h: units.update_output(_numbers(layout.view(h)), layout.unit_dims)),
            )
            return
        inner = unit_layout(site.energies, site, axes)
        if inner.rows != layout.rows:
            inner = layout
        if form.output_tells and form.scalar and units.underflow is not None:
            signed, energy = (id(self), "output"), (id(self), "energy")
            seen = self._if_even(layout, lambda h: units.update_signed(layout.view(h), layout.unit_dims))
            taps.on_value(site.emitted.key, signed, seen)
            seen = self._if_even(inner, lambda z: units.watch_underflow(inner.view(z), inner.unit_dims))
            taps.on_value(site.energies.key, energy, seen)
            return
        seen = self._if_even(layout, lambda h: units.update_magnitude(layout.view(h), layout.unit_dims))
        taps.on_value(site.emitted.key, (id(self), "output"), seen)
        if form.scalar or not form.flat:
            seen = self._if_even(inner, lambda z: units.update_energy(inner.view(z), inner.unit_dims))
        else:
            region = Region(site.energies, site.emitted, site.region)
            seen = self._if_even(inner, lambda z: self._by_gradient(units, region, inner, z))
        taps.on_value(site.energies.key, (id(self), "energy"), seen)

    def _accumulator(self, rows: tuple[int, ...], form: GateForm) -> GateUnits:
        self.uneven = self.uneven or (self._units is not None and len(self._units.rows) != len(rows))
        if self._units is None or len(self._units.rows) != len(rows):
            smooth = self._site.mechanism == "smooth-gate"
            slope = underflow(form.function, self._site.energies.dtype) if smooth else None
            self._units = GateUnits(rows, form.on_above, form.flat, form.stuck, slope)
        return self._units

    def _by_gradient(self, units: GateUnits, region: Region, layout: Layout, z: Tensor) -> None:
        """Where thresholds differ from unit to unit, the gate's own derivative says which values pass gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            at = z.detach().clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(region.replay(at).sum(), at)
        active = layout.view(slope != 0)
        units.update_active(active, active, layout.unit_dims)

    def _recurrent(self, site: Site, named: dict[str, Any]) -> None:
        assert site.form is not None
        kind = RECURRENT[site.op]
        parts = [recurrent.cell_odds(kind, named)] if "w_ih" in named else list(recurrent.sequence_odds(kind, named))
        energies = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts], -1)
        units = self._accumulator(tuple(range(energies.shape[-1])), site.form)
        units.update_energy(energies, (1,))
        units.update_magnitude(torch.relu(energies), (1,))

    def finish(self, samples: int) -> tuple[Components | None, Responsibility | None, list[str]]:
        """Return the row's components; gates have no responsibilities."""
        units, form = self._units, self._site.form
        if self.uneven:
            return None, None, ["uneven"]
        if units is None or form is None or not (units.values or units.magnitudes):
            return None, None, []
        found = units.components(self._thresholds, samples)
        found.provably_dead = _proved(self._site)
        return found, None, ["non-finite"] if units.nonfinite else []


def _numbers(h: Tensor) -> Tensor:
    return h.float() if h.dtype == torch.bool else h


def _only_member_key(site: Site) -> int:
    return next(iter(site.members)).key


def _proved(site: Site) -> list[int]:
    """Return the units that weights and input range alone prove dead: energies straight from the owner."""
    form, owner = site.form, site.owner
    if form is None or owner is None or not form.flat or not form.scalar or owner.op in RECURRENT:
        return []
    low, high = form.flat[0]
    made = site.energies.call
    while made is not None and made.op in VIEW:
        made = made.inputs[0].call
    plain = owner.op == "aten.linear" or (owner.op.startswith("aten.conv") and "transpose" not in owner.op)
    if made is not owner or not plain or low != -torch.inf:
        return []
    known = range_of(owner.inputs[0])
    weight, bias = owner.inputs[1], owner.arg("bias")
    if known is None or weight.leaf != "param" or weight.tensor is None:
        return []
    shift = bias.tensor if isinstance(bias, Value) else None
    if shift is None and isinstance(bias, Value):
        return []
    convolution = owner.op != "aten.linear"  # pads with zeros
    ends = (min(known.low, 0.0), max(known.high, 0.0)) if convolution else (known.low, known.high)
    return provably_dead(weight.tensor, shift, *ends, high, simplex=known.simplex and not convolution)


class LogisticMeter(_Watching):
    """Two-way competition inside units; one accumulator per set of rows, so that slices of one layer stay apart."""

    def __init__(self, site: Site, thresholds: Thresholds) -> None:
        self._site, self._thresholds = site, thresholds
        self._parts: dict[tuple[str, tuple[int, ...]], TwoWay] = {}

    def attach(self, site: Site, axes: Axes, taps: Taps) -> None:
        """Watch one call of the layer."""
        form = site.form
        assert form is not None
        if site.op in RECURRENT:
            taps.on_call(_only_member_key(site), (id(self), "call"), lambda named, _: self._recurrent(site, named))
            return
        layout = unit_layout(site.energies, site, axes)
        if form.half is not None:
            layout = _second_half(layout, form.half, len(site.energies.shape))
        part = self._part(layout.rows, form, site.energies.dtype)
        half = form.half

        def see(z: Tensor) -> None:
            gate = z.chunk(2, half)[1] if half is not None else z
            if layout.fits(gate):
                part.update(layout.view(gate), layout.unit_dims, form.log_odds)
            else:
                self.uneven = True

        taps.on_value(site.energies.key, (id(self), "odds"), see)

    def _part(self, rows: tuple[int, ...], form: GateForm, dtype: torch.dtype) -> TwoWay:
        key = form.label, rows
        if key not in self._parts:
            self._parts[key] = TwoWay(rows, self._thresholds, underflow(self._passing(form), dtype))
        return self._parts[key]

    def _recurrent(self, site: Site, named: dict[str, Any]) -> None:
        assert site.form is not None
        kind = RECURRENT[site.op]
        if "batch_sizes" in named:
            return  # packed sequences: the padded layout that the states need is not there
        cell = "w_ih" in named
        start = 0
        for odds in [recurrent.cell_odds(kind, named)] if cell else recurrent.sequence_odds(kind, named):
            flat = odds.reshape(-1, odds.shape[-1])
            rows = tuple(range(start, start + flat.shape[1]))
            self._part(rows, site.form, site.energies.dtype).update(flat, (1,))
            start += flat.shape[1]

    def finish(self, samples: int) -> tuple[Components | None, Responsibility | None, list[str]]:
        """Return components (frozen units, units dead by underflow) and responsibilities of the row."""
        parts = list(self._parts.values())
        if self.uneven:
            return None, None, ["uneven"]
        if not parts or not any(part.values for part in parts):
            return None, None, []
        whole = TwoWay.joined(parts, self._thresholds)
        own = [part for n, part in enumerate(parts) if all(not set(part.rows) & set(p.rows) for p in parts[:n])]
        rates = {row: rate for part in own for row, rate in zip(part.rows, part.on_rate(), strict=True)}
        dead = sorted(row for part in own for row in part.dead())
        frozen = sorted(row for part in own for row in part.frozen())
        listed = [rates[row] for row in sorted(rates)]
        found = Components("units", len(rates), dead=dead, frozen=frozen, numeric=bool(dead), on_rate=listed)
        return found, whole.responsibility(), ["non-finite"] if whole.nonfinite else []

    def _passing(self, form: GateForm) -> Callable[[Tensor], Tensor]:
        """Return a function of the odds with the derivative that such a gate passes: 0 where r underflows."""
        if form.statistic == "log":
            return torch.nn.functional.logsigmoid
        if form.statistic in {"gate", "log-partition"} and self._site.op not in RECURRENT:
            return torch.nn.functional.softplus  # value times share, and log Z: gradient on the on side is r itself
        return torch.sigmoid


def _second_half(layout: Layout, dim: int, rank: int) -> Layout:
    """Return the layout of the second half of a dimension that indexes units."""
    axis = dim % rank
    if layout.unit_dims != (axis,) or any(width != 1 for width in layout.pattern):
        return layout
    rows = layout.rows[len(layout.rows) // 2 :]
    shape = tuple(len(rows) if d == axis else size for d, size in enumerate(layout.shape))
    return Layout(shape, layout.pattern, layout.unit_dims, rows)
