"""Transport plans: an exponential scaled from both sides by inverse sums of itself (Sinkhorn's u and v)."""

from __future__ import annotations

from emscan.classify.flow import CLAMPS, DIVISIONS, PRODUCTS, ancestors, computed, source
from emscan.classify.means import CLOSE, linear_in
from emscan.classify.ratios import inverse_of
from emscan.classify.site import Site
from emscan.classify.softmax import EXPONENTIALS
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import CONTRACTION


def find(trace: Trace, claimed: set[Call]) -> list[Site]:
    """Return a site for every exponential that is scaled by inverse sums of itself: diag(u) K diag(v), u = a / Kv."""
    sites: list[Site] = []
    taken: set[Call] = set()
    for call in reversed(trace.calls):
        if call.op not in PRODUCTS or call in claimed or call in taken or not trace.is_live(call):
            continue
        factors, chain = _factors(call.out)
        kernel = next((v for v in factors if v.call is not None and v.call.op in EXPONENTIALS and computed(v)), None)
        scales = [v for v in factors if v is not kernel and inverse_of(v) is not None]
        if kernel is None or kernel.call is None or not scales or kernel.shape != call.out.shape:
            continue
        between = {v.call for s in scales for v in ancestors(s, _scaling) if v.call is not None and _scaling(v.call)}
        if not any(c.op in CONTRACTION and any(source(v).flow == kernel.flow for v in c.inputs) for c in between):
            continue
        axis = _even_axis(call.out)
        if axis is None:
            continue
        members = chain | between | {kernel.call}
        taken |= members
        site = Site(
            "em", "softmax", "Softmax", members, kernel.call.inputs[0], call.out, "vector", call.out.shape[axis], "units",
            axes=(axis,), op=kernel.call.op, weights=call.out, weights_axes=(axis,),
        )  # fmt: skip
        sites.append(site)
    return sites


def _factors(value: Value) -> tuple[list[Value], set[Call]]:
    """Return what a product is a product of, seen through views, and the calls in between."""
    factors, chain, stack = list[Value](), set[Call](), [value]
    while stack:
        item = source(stack.pop())
        call = item.call
        if call is not None and call.op in PRODUCTS and inverse_of(item) is None:
            chain.add(call)
            stack.extend(call.inputs)
        else:
            factors.append(item)
    return factors, chain


def _scaling(call: Call) -> bool:
    """Whether a call is a step of the scaling: products and sums of the kernel, inverses, guards."""
    return linear_in(call) or call.op in DIVISIONS or call.op in CLAMPS or call.op in {"aten.reciprocal", "aten.pow"}


def _even_axis(value: Value) -> int | None:
    """Return the axis (negative) along which the entries have the same sum everywhere; without numbers, the last."""
    if value.tensor is None:
        return -1
    for axis in (-1, -2) if value.tensor.dim() > 1 else (-1,):
        sums = value.tensor.double().sum(axis)
        if value.shape[axis] >= 2 and float(sums.max() - sums.min()) <= CLOSE * float(sums.abs().max()):
            return axis
    return None
