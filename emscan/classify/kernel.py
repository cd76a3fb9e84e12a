"""Kernels: positive weights normalized over alternatives without an exponential (E = -log k)."""

from __future__ import annotations

from emscan.classify.flow import PRODUCTS, RESHAPES
from emscan.classify.ratios import Ratio
from emscan.classify.regions import Regions
from emscan.classify.site import Site
from emscan.classify.softmax import exponent
from emscan.trace.graph import Call, Value
from emscan.trace.operators import PASS


def from_ratio(ratio: Ratio, regions: Regions) -> Site | None:
    """Return the site of positive weights over their own sum; None where the weights are exponentials or no function
    of parameters and input both (a learned vector over its own sum is weight normalization)."""
    if exponent(ratio.weights) is not None or not (ratio.weights.data and ratio.weights.param):
        return None
    if _choices(ratio.weights):
        return None
    energies, inner = scores_of(ratio.weights, regions)
    op = max(inner, key=lambda call: call.id).op if inner else ratio.call.op
    return ratio.site("kernel", "Normalized kernel", ratio.members | inner, energies, op)


def _choices(weights: Value) -> bool:
    """Whether weights are zeros and ones: winners of another competition, counted, not shares."""
    tensor = weights.tensor
    if tensor is None or not bool((tensor.abs() < 1e-5).any()):
        return False
    return bool(((tensor.abs() < 1e-5) | ((tensor - 1).abs() < 1e-5)).all())


def scores_of(weights: Value, regions: Regions) -> tuple[Value, set[Call]]:
    """Return what positive weights are computed from entry by entry, and the calls in between."""
    members: set[Call] = set()
    value = weights
    for _ in range(8):
        region = regions.region(value)
        members.update(region.calls)
        value = region.base
        call = value.call
        if call is None or value.shape != weights.shape:
            break
        if call.op in PASS or call.op in RESHAPES:
            value = call.inputs[0]
        elif call.op in PRODUCTS:
            value = next((v for v in call.inputs if v.shape == weights.shape and v.param), value)
            if value is region.base:
                break
            members.add(call)
        else:
            break
    return (value if value.shape == weights.shape else weights), members
