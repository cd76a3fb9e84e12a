"""Units proven dead by weights and range alone: found where certain, never claimed where an input could fire them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from emscan.measure.provable import largest_energy, provably_dead

RANGES = [(0.0, math.inf), (-1.0, 1.0), (0.0, 1.0), (0.0, 6.0), (-2.5, 0.5), (-math.inf, math.inf)]


def test_each_range_by_hand() -> None:
    weight = torch.tensor([[-1.0, -2.0], [-1.0, 2.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    bias = torch.tensor([-0.1, -0.1, -0.1, -1.5, 0.5])
    assert provably_dead(weight, bias, 0.0, math.inf, 0.0) == [0, 2]
    assert provably_dead(weight, bias, -1.0, 1.0, 0.0) == [2]
    assert provably_dead(weight, bias, -math.inf, math.inf, 0.0) == [2]
    assert provably_dead(weight, bias, 0.0, 1.0, 0.0, simplex=True) == [0, 2, 3]
    assert provably_dead(weight, None, 0.0, math.inf, 0.0) == [0, 2, 4]
    assert provably_dead(weight, bias, 0.0, math.inf, -0.3) == []


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 100_000),
    st.sampled_from(RANGES),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(-4, 2),
)
def test_no_input_in_the_range_exceeds_the_bound(
    seed: int, ends: tuple[float, float], dtype: torch.dtype, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(6, 9, generator=generator) + shift / 4).to(dtype)
    bias = (torch.randn(6, generator=generator) + shift).to(dtype)
    low, high = (max(ends[0], -1e4), min(ends[1], 1e4))
    bound = largest_energy(weight, bias, *ends)
    corners = torch.where(torch.rand(200, 9, generator=generator) < 0.5, low, high)
    inside = low + (high - low) * torch.rand(200, 9, generator=generator)
    best = torch.where(weight.double() > 0, high, low)  # the corner of every row
    x = torch.cat([corners, inside, best]).to(dtype)
    energies = F.linear(x, weight, bias).double()
    assert bool((energies <= bound).all())
    dead = provably_dead(weight, bias, *ends, 0.0)
    assert not bool((energies[:, dead] > 0).any())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 100_000), st.floats(-3, 1))
def test_the_simplex_bound_holds_for_softmax_outputs(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator)
    bias = torch.randn(5, generator=generator) + shift
    scores = torch.randn(300, 7, generator=generator) * 5
    r = torch.cat([torch.softmax(scores, -1), torch.eye(7)])
    bound = largest_energy(weight, bias, 0.0, 1.0, simplex=True)
    assert bool((F.linear(r, weight, bias).double() <= bound).all())
    torch.testing.assert_close(bound, (weight.amax(1) + bias).double(), rtol=1e-4, atol=1e-4)


def test_a_unit_at_the_edge_of_rounding_is_not_claimed() -> None:
    weight = torch.full((1, 4096), 1e-4)
    exact = float(weight.double().sum())
    assert provably_dead(weight, torch.tensor([-exact]), 0.0, 1.0, 0.0) == []
    assert provably_dead(weight, torch.tensor([-exact * 1.01]), 0.0, 1.0, 0.0) == [0]


def test_convolutions_reach_over_their_whole_kernel_and_padding() -> None:
    weight = -torch.rand(3, 2, 3, 3)
    weight[1, 0, 1, 1] = 0.5
    bias = torch.tensor([-0.1, -0.1, 0.1])
    x = torch.rand(4, 2, 8, 8) * 50
    fires = (F.conv2d(x, weight, bias, padding=1) > 0).flatten(2).any(2).any(0)
    dead = provably_dead(weight, bias, 0.0, math.inf, 0.0)
    assert dead == [0]
    assert not fires[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_prove_nothing(bad: float) -> None:
    weight = -torch.ones(2, 3)
    weight[0, 1] = bad
    assert provably_dead(weight, None, 0.0, math.inf, 0.0) == [1]
