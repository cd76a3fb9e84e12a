"""Units of a gate: exact counts against a float64 recomputation, and lists that mean what the specification says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emscan.measure import units as module
from emscan.measure.chunks import PIECE, pieces, pieces_of
from emscan.measure.two_way import underflow
from emscan.measure.units import GateUnits, upper_bound
from emscan.report.document import Components, Thresholds
from tests.measure.layouts import LAYOUTS, by_unit

RELU = {"on_above": 0.0, "flat": ((-math.inf, 0.0),), "stuck": (0.0,)}
RELU6 = {"on_above": 0.0, "flat": ((-math.inf, 0.0), (6.0, math.inf)), "stuck": (0.0, 6.0)}
HARDSHRINK = {"on_above": 0.5, "flat": ((-0.5, 0.5),), "stuck": (0.0,)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
T = Thresholds()


def gate(count: int, **form: object) -> GateUnits:
    return GateUnits(tuple(range(count)), **form)  # type: ignore[arg-type]


def relu_of(z: Tensor, axis: int = 1) -> Components:
    units = gate(z.shape[axis], **RELU)
    units.update_output(z.relu(), (axis,))
    return units.components(T, len(z))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_and_means_are_exact_in_every_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    z, axis = LAYOUTS[layout]()
    z = (z * 4).to(dtype)
    before = z.clone()
    for form, function in ((RELU, F.relu), (RELU6, F.relu6), (HARDSHRINK, F.hardshrink)):
        units = gate(12, **form)
        units.update_energy(z, (axis,))
        units.update_magnitude(function(z), (axis,))
        rows, h = by_unit(z, axis), by_unit(function(z), axis)
        flat = torch.stack([(rows >= low) & (rows <= high) for low, high in form["flat"]])
        assert torch.equal(units.on, (rows > form["on_above"]).sum(1))
        assert torch.equal(units.active, (~flat.any(0)).sum(1))
        assert torch.equal(units.in_flat, flat.sum(2))
        assert units.values == rows.shape[1]
        torch.testing.assert_close(units.magnitude / units.magnitudes, h.abs().mean(1), rtol=1e-5, atol=1e-12)
    assert torch.equal(z, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_alone_tells_the_same_of_a_relu(layout: str) -> None:
    z, axis = LAYOUTS[layout]()
    by_energy, by_output = gate(12, **RELU), gate(12, **RELU)
    by_energy.update_energy(z, (axis,))
    by_energy.update_magnitude(z.relu(), (axis,))
    by_output.update_output(z.relu(), (axis,))
    assert by_energy.components(T, 5) == by_output.components(T, 5)


def test_units_over_two_axes_are_row_major() -> None:
    z = torch.randn(6, 3, 50, 4)
    units = gate(12, **RELU)
    units.update_output(z.relu(), (1, 3))
    assert torch.equal(units.on, (z > 0).sum((0, 2)).flatten())


def test_rows_of_the_weight_name_the_units() -> None:
    z = torch.ones(10, 3) * torch.tensor([-1.0, 1.0, -1.0])
    units = GateUnits((7, 2, 4), 0.0, ((-math.inf, 0.0),), (0.0,))
    units.update_output(z.relu(), (1,))
    found = units.components(T, 10)
    assert (found.dead, found.linear, found.on_rate) == ([4, 7], [2], [1.0, 0.0, 0.0])


@pytest.mark.parametrize("every", [4096, PIECE * 3])
def test_a_unit_that_fires_once_in_many_is_never_dead(every: int) -> None:
    for place in (0, every // 2, every - 1):
        z = -torch.ones(every, 3)
        z[place, 1] = 1e-30
        found = relu_of(z)
        assert (found.dead, found.rare) == ([0, 2], [1])
        assert found.on_rate is not None
        assert found.on_rate[1] == pytest.approx(1 / every, rel=1e-12)


def test_once_in_ten_million_values_is_seen_and_counted() -> None:
    units = gate(1, **RELU)
    batch = torch.zeros(2_500_000, 1)
    for step in range(4):
        batch[-1] = float(step == 3)
        units.update_output(batch, (1,))
    assert (units.on.tolist(), units.values) == ([1], 10_000_000)
    assert units.components(T, 4).dead == []


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 39))
def test_lists_are_disjoint_and_do_not_depend_on_batches_order_or_shards(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.empty(1, 16).uniform_(-3, 1, generator=generator)
    z = torch.randn(40, 16, generator=generator) * scale + torch.randn(1, 16, generator=generator) * 2
    whole = relu_of(z)
    lists = [whole.dead, whole.rare, whole.dormant]
    assert sum(map(len, lists)) == len(set().union(*lists))
    assert not set(whole.dead) & set(whole.linear)
    a, b, both = gate(16, **RELU), gate(16, **RELU), gate(16, **RELU)
    a.update_output(z[:cut].relu(), (1,))
    b.update_output(z[cut:].relu(), (1,))
    for part in z[torch.randperm(40, generator=generator)].split(7):
        both.update_output(part.relu(), (1,))
    a.merge(b)
    assert a.components(T, 40) == both.components(T, 40) == whole


def test_dead_rare_dormant_and_linear_by_their_definitions() -> None:
    h = torch.rand(1000, 6) + 1
    h[:, 0] = 0
    h[1:, 1], h[0, 1] = 0, 50.0
    h[::2, 2], h[1::2, 2] = 0, 1e-3
    h[:10, 3], h[10:, 3] = 1.0, 0  # on for exactly 1 %: not rare, and dormant by its mean
    units = gate(6, **RELU)
    units.update_output(h, (1,))
    found = units.components(T, 1000)
    assert (found.dead, found.rare, found.dormant, found.linear) == ([0], [1], [2, 3], [4, 5])
    assert found.stuck_at is None
    assert found.upper_bound == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert units.components(Thresholds(rare=0.02), 1000).rare == [1, 3]


def test_stuck_constants_of_a_clipped_gate() -> None:
    z = torch.stack([torch.full((9,), 8.0), torch.full((9,), -1.0), torch.linspace(-1, 8, 9), torch.full((9,), 6.0)], 1)
    z = torch.cat([z, torch.tensor([-3.0, 9.0]).repeat(5)[:9, None]], 1)  # jumps between both flat ends
    units = gate(5, **RELU6)
    units.update_energy(z, (1,))
    units.update_magnitude(F.relu6(z), (1,))
    found = units.components(T, 9)
    assert (found.dead, found.stuck_at) == ([0, 1, 3, 4], [6.0, 0.0, 6.0, None])
    assert found.linear == []


def test_no_bound_where_every_unit_was_seen_on() -> None:
    assert relu_of(torch.ones(5, 2)).upper_bound is None
    assert upper_bound(0) is None
    assert upper_bound(1000) == pytest.approx(3 / 1000, rel=0.01)


def test_a_leaky_gate_has_no_dead_unit() -> None:
    z = -torch.rand(100, 4) - 1
    units = gate(4)
    units.update_energy(z, (1,))
    units.update_magnitude(F.leaky_relu(z), (1,))
    found = units.components(T, 100)
    assert (found.dead, found.rare) == ([], [0, 1, 2, 3])


def test_thresholds_that_differ_between_units() -> None:
    theta = torch.tensor([0.5, 5.0, -5.0])
    z = torch.randn(PIECE // 2, 3).clamp(-4, 4)
    on = z > theta
    units = gate(3, flat=((-math.inf, 0.0),), stuck=(0.0,))
    units.update_active(on, on, (1,))
    units.update_magnitude(z * on, (1,))
    assert torch.equal(units.on, on.sum(0))
    found = units.components(T, 10)
    assert (found.dead, found.linear) == ([1], [2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_smooth_units_die_by_underflow_only(dtype: torch.dtype) -> None:
    z = torch.stack([torch.randn(50), torch.full((50,), -40.0), torch.full((50,), -3.0), torch.full((50,), 40.0)], 1)
    units = GateUnits((0, 1, 2, 3), derivative=underflow(F.gelu, dtype))
    units.update_energy(z.to(dtype), (1,))
    units.update_magnitude(F.gelu(z), (1,))
    found = units.components(T, 50)
    assert (found.dead, found.numeric) == ([1], True)


def test_one_live_value_between_saturated_ones_keeps_a_unit_alive() -> None:
    z = torch.tensor([-50.0, 50.0]).repeat(20)[:, None].repeat(1, 2)
    z[7, 1] = 0.3
    units = GateUnits((0, 1), derivative=underflow(torch.erf, torch.float32))
    for part in z.split(5):
        units.update_energy(part, (1,))
    assert units.components(T, 40).dead == [0]


def test_a_gelu_network_has_no_dead_unit() -> None:
    z = torch.randn(400, 32) * 3
    units = GateUnits(tuple(range(32)), derivative=underflow(F.gelu, torch.float32))
    units.update_energy(z, (1,))
    units.update_magnitude(F.gelu(z), (1,))
    found = units.components(T, 400)
    assert (found.dead, found.numeric, found.upper_bound) == ([], False, None)


def test_values_that_are_not_finite_are_told_and_spoil_nothing_else() -> None:
    z = torch.randn(60, 4)
    z[:, 3] = -1.0
    clean = relu_of(z)
    z[5, 3], z[6, 2], z[7, 1] = math.nan, math.inf, -math.inf
    for way in ("output", "energy"):
        units = gate(4, **RELU)
        if way == "output":
            units.update_output(z.relu(), (1,))
        else:
            units.update_energy(z, (1,))
            units.update_magnitude(z.relu(), (1,))
        assert units.nonfinite
        found = units.components(T, 60)
        assert found.dead == []  # relu passes NaN's gradient on
        assert clean.dead == [3]
        assert units.on[0] == (z[:, 0] > 0).sum()
        assert units.magnitude.isfinite().all()
        assert found.dormant == []


def test_sums_beyond_float32_are_no_infinities() -> None:
    h = torch.full((100, 2), 3e38)
    units = gate(2, **RELU)
    units.update_output(h, (1,))
    assert not units.nonfinite
    torch.testing.assert_close(units.magnitude / 100, h[0].double(), rtol=1e-6, atol=0)


def test_an_empty_batch_changes_nothing() -> None:
    units = gate(3, **RELU)
    units.update_output(torch.empty(0, 3), (1,))
    assert units.values == 0
    assert units.components(T, 0).dead == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_cover_every_value_once_and_never_cut_units(layout: str) -> None:
    z, axis = LAYOUTS[layout]()
    numbers = torch.arange(z.numel()).reshape(z.shape)
    seen = []
    for part, same in pieces_of((z, numbers), (axis,), size=30):
        assert part.shape[axis] == 12
        assert part.shape == same.shape
        seen.append(same.flatten())
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(z.numel()))


def test_pieces_stay_small_whatever_the_axes() -> None:
    for shape, kept in (((1, 1, 8, 5000, 3), 2), ((2, 8, 5000), 1)):
        parts = list(pieces(torch.empty(shape), (kept,), size=1000))
        assert all(part.numel() <= 4 * 1000 for part in parts)
        assert sum(part.numel() for part in parts) == math.prod(shape)


def test_scratch_has_the_memory_order_of_its_tensor_and_never_overlaps() -> None:
    for z in (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.empty(4, 6).T[::2]):
        found = module._scratch.like(z)
        assert found.shape == z.shape
        order = sorted(range(z.dim()), key=z.stride)
        assert order == sorted(range(z.dim()), key=found.stride)
    expanded = module._scratch.like(torch.empty(3, 1).expand(3, 7))
    expanded.copy_(torch.arange(21.0).view(3, 7))
    assert torch.equal(expanded, torch.arange(21.0).view(3, 7))


@pytest.mark.parametrize("shape", [(300, 12), (7, 12, 5, 5), (4, 9, 12)])
def test_gelu_outputs_alone_tell_what_energies_and_outputs_tell(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    axis = (shape.index(12),)
    z = torch.randn(shape) * 3
    h = torch.nn.functional.gelu(z)
    derivative = lambda at: torch.ones_like(at)  # noqa: E731
    both, alone = (GateUnits(tuple(range(12)), 0.0, (), (), derivative) for _ in range(2))
    both.update_energy(z, axis)
    both.update_magnitude(h, axis)
    alone.update_signed(h, axis)
    alone.watch_underflow(z, axis)
    assert alone.components(Thresholds(), 5) == both.components(Thresholds(), 5)
