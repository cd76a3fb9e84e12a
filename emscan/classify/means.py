"""Posterior means whose numerator and denominator are accumulated apart: running sums, linear attention, scatters.

N / D is a mean under weights w_h if both are linear in the same weights: N = sum_h w_h v_h and D = sum_h w_h. The
numbers decide, not the spelling: with every v_h replaced by one, the model's own calls must turn N into D, and no
derivative dN / dv_h, which is the weight w_h itself, may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from emscan.classify.flow import (
    CLAMPS,
    DIVISIONS,
    INDEXERS,
    PRODUCTS,
    RESHAPES,
    SCATTERS,
    ancestors,
    carries,
    computed,
    cut_off,
    source,
)
from emscan.classify.ratios import divisions, inverse_of
from emscan.classify.replay import replay
from emscan.classify.signs import nonnegative
from emscan.classify.site import Site
from emscan.classify.softmax import EXPONENTIALS
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import BINARY_EXTREMUM, CONTRACTION, EXTREMUM, JOIN, PASS, SOFTMAX, VIEW, pointwise

_ADDS = frozenset(f"aten.{name}" for name in "add index_add scatter_add sum cumsum mean scatter_reduce".split())
_LINEAR = (
    VIEW | PASS | JOIN | PRODUCTS | CONTRACTION | INDEXERS | SCATTERS | _ADDS
    | frozenset({"aten.sub", "aten.neg", "aten.masked_fill", "aten.where", "aten.index_copy", "aten.copy"})
)  # fmt: skip
_MOST_CALLS = 6000
_ENTRIES = 6  # entries of a numerator whose weights are looked at
CLOSE = 5e-3
_MOST_ENTRIES = 1 << 22  # of values made up to count alternatives without weights


@dataclass
class _Cone:
    """What a value is a linear function of: the calls in between and the values where they begin."""

    calls: set[Call]
    leaves: list[Value]


def find(trace: Trace, claimed: set[Call]) -> list[Site]:
    """Return a site for every mean under weights that no larger structure has claimed."""
    sites: list[Site] = []
    covered: dict[Call, Site] = {}
    for call in reversed(trace.calls):
        if call in claimed or not trace.is_live(call):
            continue
        for numerator, denominator, extra in (*divisions(call), *_einsum_divisions(call)):
            if not (computed(numerator) and computed(denominator) and denominator.floating):
                continue
            inner, guards = _unguarded(denominator)
            below = _cone(inner)
            earlier = next((covered[c] for c in below.calls if c in covered), None)
            if earlier is not None:  # a step of the same recursion, or another mean under the same weights
                earlier.members |= {call} | extra | guards | below.calls | _stabilizers(below.leaves)
                covered.update(dict.fromkeys(below.calls, earlier))
                break
            site = _mean(call, _Fraction(numerator, inner, extra | guards, below))
            if site is not None:
                sites.append(site)
                covered.update(dict.fromkeys(below.calls, site))
                break
    return sites[::-1]


def _einsum_divisions(call: Call) -> Iterator[tuple[Value, Value, set[Call]]]:
    """Yield what a contraction divides by: one of its operands is an inverse. The numerator is the contraction itself."""
    if call.op != "aten.einsum" or len(call.inputs) < 3:
        return
    for factor in call.inputs:
        inverse = inverse_of(factor)
        if inverse is not None:
            yield call.out, inverse[0], inverse[1] | {c for c in [factor.call] if c is not None}


@dataclass
class _Fraction:
    """A numerator over a denominator; ``extra``: calls in between; ``below``: what the denominator is made of."""

    numerator: Value
    denominator: Value
    extra: set[Call]
    below: _Cone


def _mean(call: Call, fraction: _Fraction) -> Site | None:
    below, inner = fraction.below, fraction.denominator
    kernels = [v for v in below.leaves if _kernel(v)]
    if not kernels or not any(_accumulates(c) for c in below.calls):
        return None
    # by what was computed: a model may compute the same weights twice
    weights = {out.flow for c in below.calls for out in c.outputs} | {v.flow for v in below.leaves}
    divided = fraction.numerator is call.out  # a contraction that multiplies by the inverse
    if divided:
        weights |= {out.flow for c in fraction.extra for out in c.outputs}
    numerator = fraction.numerator if divided else _peeled(fraction.numerator, weights)
    mixed, values = _split(numerator, _cone(numerator, divided=True), weights)
    if not mixed or not values:
        mixed, values = _beside_ones(numerator, below)
    if not mixed or not values:
        return None
    exponential = [v for v in kernels if v.call is not None and v.call.op in EXPONENTIALS]
    count = alternatives_of(numerator, None if divided else inner, mixed, values)
    if count is None or count == 1:
        return None
    if not _has_numbers([numerator, inner, *values]) and not all(nonnegative(v) for v in below.leaves if computed(v)):
        return None  # without numbers, what is no exponential or the like may be negative
    made = max(exponential or kernels, key=lambda v: (not cut_off(v), v.data, math.prod(v.shape))).call
    assert made is not None
    # a gate that decays what was accumulated is a row of its own
    members = {call} | fraction.extra | below.calls | set(mixed) | {v.call for v in exponential or kernels if v.call}
    members |= _stabilizers(kernels)
    site = Site(
        "em", "softmax" if exponential else "kernel", "Softmax" if exponential else "Normalized kernel", members,
        made.inputs[0], call.out, "mean", count or None, "keys", axes=(), op=made.op,
        denominator=None if divided else inner,
    )  # fmt: skip
    site.numerator, site.values, site.mixed = numerator, values, mixed
    site.notes.append("numerator and denominator are accumulated apart: statistics are not measured")
    return site


def _peeled(value: Value, weights: set[int]) -> Value:
    """Take off factors that have no part in the weights: a gate on the mean."""
    for _ in range(12):
        call = value.call
        if call is None or value.flow in weights:
            break
        if call.op in PASS or call.op in RESHAPES:
            value = call.inputs[0]
        elif call.op in PRODUCTS and len(call.inputs) == 2:
            pure = [v for v in call.inputs if not any(a.flow in weights for a in ancestors(v, linear_in))]
            if len(pure) != 1:
                break
            value = next(v for v in call.inputs if v is not pure[0])
        else:
            break
    return value


def _unguarded(value: Value) -> tuple[Value, set[Call]]:
    """Take off what only keeps a division safe: clamps, absolute values, small constants."""
    guards: set[Call] = set()
    while value.call is not None:
        call = value.call
        constant = call.op == "aten.add" and sum(computed(v) for v in call.inputs) == 1
        if not (call.op in PASS or call.op in RESHAPES or call.op in CLAMPS or call.op == "aten.abs" or constant):
            break
        guards.add(call)
        value = next((v for v in call.inputs if computed(v)), call.inputs[0])
    return value, guards


def linear_in(call: Call) -> bool:
    """Whether a call is linear in each of its computed operands and no layer of its own."""
    if call.op in CONTRACTION:
        return not any(v.param and not v.data and v.floating and not _kernel(source(v)) for v in call.inputs)
    if call.op in DIVISIONS:
        return len(call.inputs) < 2 or not computed(call.inputs[1])
    return call.op in _LINEAR


def _cone(value: Value, *, divided: bool = False) -> _Cone:
    """Return what leads to a value; ``divided``: through quotients too, as a mean that is normalized at every step."""
    calls: set[Call] = set()
    leaves: list[Value] = []
    stack, seen = [value], {value.id}
    while stack:
        item = stack.pop()
        call = item.call
        if call is None or not computed(item) or not _passes(call, divided) or len(calls) > _MOST_CALLS:
            leaves.append(item)
            continue
        calls.add(call)
        for parent in call.inputs:
            if parent.id not in seen and parent.floating:
                seen.add(parent.id)
                stack.append(parent)
    return _Cone(calls, leaves)


def _passes(call: Call, divided: bool) -> bool:
    return linear_in(call) or (divided and call.op in DIVISIONS)


def _kernel(value: Value) -> bool:
    """Whether a value is some function of its own energies, entry by entry or normalized: what weights are made of."""
    call = value.call
    if call is None or not value.param or not value.floating:
        return False
    return call.op in SOFTMAX or (pointwise(call.op) and call.op not in _LINEAR and call.op not in DIVISIONS)


def _accumulates(call: Call) -> bool:
    if call.op in _ADDS:
        return call.op != "aten.add" or sum(computed(v) for v in call.inputs) > 1
    return call.op in CONTRACTION


def _split(numerator: Value, cone: _Cone, weights: set[int]) -> tuple[list[Call], list[Value]]:
    """Return the numerator's calls that mix weights with other things, in order, and those other things."""
    if numerator.flow in weights:
        return [], []
    mixed: list[Call] = []
    impure: set[int] = set()
    for call in sorted(cone.calls, key=lambda c: c.id):
        if any(out.flow in weights for out in call.outputs):
            continue
        if any(v.flow in weights or v.id in impure for v in call.inputs):
            mixed.append(call)
            impure.update(out.id for out in call.outputs)
    if numerator.id not in impure:
        return [], []
    values: dict[int, Value] = {}
    for call in mixed:
        for v in call.inputs:
            if v.flow not in weights and v.id not in impure and v.floating and v.data:
                values[v.id] = v
    return mixed, list(values.values())


def _beside_ones(numerator: Value, below: _Cone) -> tuple[list[Call], list[Value]]:
    """Values that are joined with ones: one product then holds numerator and denominator side by side."""
    for join in below.calls:
        if join.op not in JOIN and join.op not in {"aten.pad", "aten.constant_pad_nd"}:
            continue
        values = [v for v in join.inputs if v.floating and v.data]
        if len(values) != 1:
            continue
        made, mixed = {join.out.id}, [join]
        for call in sorted(_cone(numerator).calls, key=lambda c: c.id):
            if call is not join and any(v.id in made for v in call.inputs):
                mixed.append(call)
                made.update(out.id for out in call.outputs)
        if numerator.id in made:
            return mixed, values
    return [], []


def alternatives_of(numerator: Value, denominator: Value | None, mixed: list[Call], values: list[Value]) -> int | None:
    """Return how many alternatives a mean is over (0 where there are no numbers); None if it is no mean.

    ``denominator`` is None where ``numerator`` is divided already.
    """
    if not _has_numbers([numerator, *([denominator] if denominator else []), *values]):
        return _support(numerator, mixed, values)
    ones = {v.id: torch.ones_like(v.tensor) for v in values if v.tensor is not None}
    try:
        again = replay(mixed, ones, torch.float64)[numerator.id]
        total = torch.ones_like(again)
        if denominator is not None and denominator.tensor is not None:
            fitted = fit(denominator.tensor.double(), again.shape)
            if fitted is None or not bool((fitted >= 0).all()):
                return None
            total = fitted
        if float((again - total).abs().max()) > CLOSE * float(total.abs().max()):
            return None
        shares = list(jacobian(numerator, mixed, values, torch.float64))
    except (RuntimeError, TypeError, KeyError, IndexError, NotImplementedError):
        return None  # a call that cannot be run again on its own
    if not shares or any(float(w.min()) < -1e-9 * float(w.abs().max()) for w in shares):
        return None
    return max(int((w > 0).sum()) for w in shares)


def _has_numbers(values: list[Value]) -> bool:
    return all(v.tensor is not None for v in values)


def _support(numerator: Value, mixed: list[Call], values: list[Value]) -> int:
    """Return on how many entries of the values an entry of the numerator depends, all numbers being one; 0 if unknown."""
    made = {out.id for call in mixed for out in call.outputs}
    given = {v.id: v for call in mixed for v in call.inputs if v.floating and v.id not in made}
    if sum(math.prod(v.shape) for v in given.values()) > _MOST_ENTRIES:
        return 0
    ones = {key: torch.ones(v.shape) for key, v in given.items() if v.tensor is None}
    try:
        with torch.enable_grad():
            leaves = [torch.ones(v.shape, requires_grad=True) for v in values]
            known = ones | {v.id: leaf for v, leaf in zip(values, leaves, strict=True)}
            out = replay(mixed, known, torch.float32)[numerator.id].flatten()
            grads = torch.autograd.grad(out[-1], leaves, allow_unused=True)
    except (RuntimeError, TypeError, KeyError, IndexError, NotImplementedError):
        return 0
    # a state that was stored is where a recursion starts, no alternative
    stored = [
        any(a.call and a.call.op == "emscan.mutated" for a in ancestors(v, lambda c: c.op in VIEW)) for v in values
    ]
    return sum(int((g != 0).sum()) for g, old in zip(grads, stored, strict=True) if g is not None and not old)


def fit(total: Tensor, shape: torch.Size) -> Tensor | None:
    """Bring a denominator to the numerator's shape: it may lack the axis of the values, at the end."""
    for candidate in (total, total.unsqueeze(-1)):
        try:
            return candidate.expand(shape)
        except RuntimeError:
            continue
    return None


def jacobian(numerator: Value, mixed: list[Call], values: list[Value], dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Yield, for a few entries of the numerator, the weight of every entry of the values: dN / dv, flat."""
    with torch.enable_grad():
        leaves = {
            v.id: torch.ones_like(v.tensor, dtype=dtype or v.tensor.dtype).requires_grad_(True)
            for v in values
            if v.tensor is not None
        }
        out = replay(mixed, leaves, dtype)[numerator.id].flatten()
        places = torch.linspace(len(out) - 1, 0, min(_ENTRIES, len(out))).round().long().unique()
        for place in places.flip(0).tolist():
            grads = torch.autograd.grad(out[place], list(leaves.values()), retain_graph=True, allow_unused=True)
            yield torch.cat([g.flatten() for g in grads if g is not None])


def _stabilizers(kernels: list[Value]) -> set[Call]:
    """Return the extrema inside the exponents: they keep the exponential in range and cancel in the ratio."""
    found: set[Call] = set()
    for kernel in kernels:
        made = kernel.call
        if made is None or made.op not in EXPONENTIALS:
            continue
        for value in ancestors(made.inputs[0], lambda c: carries(c) or c.op in EXTREMUM or c.op in BINARY_EXTREMUM):
            call = value.call
            if call is not None and (call.op in EXTREMUM or call.op in BINARY_EXTREMUM) and computed(source(value)):
                found.add(call)
    return found
