"""Weights divided by their own sum: the hand-written form of every normalization over alternatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emscan.classify.flow import (
    ADDS,
    CLAMPS,
    DIVISIONS,
    INDEXERS,
    PRODUCTS,
    RESHAPES,
    computed,
    same,
    source,
    variables,
)
from emscan.classify.signs import nonnegative
from emscan.classify.site import Site
from emscan.report.document import Mechanism
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import CONTRACTION, EXTREMUM, PASS
from emscan.trace.origins import reduced_axes

_SEGMENT_SUMS = frozenset({"aten.index_add", "aten.scatter_add", "aten.scatter_reduce"})
_GUARD = 1e-4  # an added constant up to here guards the division
_SHARE = 1e-3  # and one below this share of the sum decides nothing


@dataclass
class Ratio:
    """``call`` divides something made of ``weights`` by the sum of ``weights`` over ``axes`` (negative).

    ``vector``: the normalized weights themselves come out; otherwise a mean under them does.
    ``sink``: a constant of its own in the denominator.
    """

    call: Call
    weights: Value
    axes: tuple[int, ...]
    vector: bool
    members: set[Call]
    denominator: Value
    guarded: bool = False
    sink: bool = False
    learned: bool = False  # the sink's energy is a parameter
    segments: Call | None = None  # the scatter that adds up, where every weight's index says to which sum it belongs

    @property
    def count(self) -> int:
        """Number of alternatives; of all segments together where the sums run over segments."""
        return math.prod(self.weights.shape[axis] for axis in self.axes)

    def site(self, mechanism: Mechanism, label: str, members: set[Call], energies: Value, op: str) -> Site:
        """Return the site of these weights over their sum."""
        count = None if self.segments is not None else self.count + self.sink
        return Site(
            "em", mechanism, label, members, energies, self.call.out, "vector" if self.vector else "mean", count, "units",
            axes=self.axes, op=op, sink=self.sink, learned_sink=self.learned, guarded=self.guarded,
            weights=self.weights, weights_axes=self.axes, denominator=self.denominator, segments=self.segments,
        )  # fmt: skip


@dataclass
class Total:
    """A sum of ``weights`` over ``axes``, found behind views, guards and added constants."""

    weights: Value
    axes: tuple[int, ...]
    members: set[Call]
    guarded: bool = False
    sink: bool = False
    constant: float = 0.0  # the weight of the sink, where it is a number
    learned: bool = False
    segments: Call | None = None


def total(value: Value, *, mean: bool = False) -> Total | None:
    """Return the sum that ``value`` is, if it is one (or the mean, if asked: in a logarithm it differs by log K)."""
    members: set[Call] = set()
    sink = guarded = learned = False
    constant = 0.0
    while value.call is not None:
        call = value.call
        if call.op in PASS or call.op in RESHAPES or call.op in CLAMPS:
            guarded = guarded or call.op in CLAMPS
            value = call.inputs[0]
        elif call.op in ADDS and call.op != "aten.rsub" and variables(call) <= 1 and len(call.inputs) <= 2:
            inner = next((v for v in call.inputs if computed(v)), call.inputs[0])
            weight = _added(call, inner)
            constant += weight
            sink, guarded = sink or weight > 0, True
            learned = learned or (weight > 0 and any(v.param for v in call.inputs if v is not inner))
            members.add(call)
            value = inner
        elif call.op == "aten.add" and (fixed := _fixed_energy(call)) is not None:
            value, extra = fixed
            learned = learned or any(v.param and not v.data for c in extra for v in c.inputs)
            members |= {call} | extra
            sink = guarded = True
        else:
            break
    call = value.call  # type: ignore[assignment]
    if call is None:
        return None
    members.add(call)
    if call.op == "aten.sum" or (mean and call.op == "aten.mean"):
        weights = call.inputs[0]
        rank = len(weights.shape)
        axes = tuple(axis - rank for axis in reduced_axes(call, rank))
        return Total(weights, axes, members, guarded, sink, constant, learned) if axes else None
    if call.op in INDEXERS:
        made = source(call.inputs[0]).call
        if made is not None and made.op in _SEGMENT_SUMS and len(made.inputs) == 3 and not made.inputs[0].data:
            weights, axis = made.inputs[2], made.arg("dim", 0)
            if made.op == "aten.scatter_reduce" and made.arg("reduce") != "sum":
                return None
            axes = (axis % len(weights.shape) - len(weights.shape),) if weights.shape else ()
            return Total(weights, axes, members | {made}, guarded, segments=made)
    if call.op in {"aten.linalg_vector_norm", "aten.norm"} and _order(call) == 1:
        weights = call.inputs[0]
        rank = len(weights.shape)
        return Total(weights, tuple(a - rank for a in reduced_axes(call, rank)), members, guarded, sink)
    if call.op in CONTRACTION and len(call.inputs) == 2:  # e @ ones
        plain = [v for v in call.inputs if not v.data and not v.param]
        if len(plain) == 1 and plain[0].tensor is not None and bool((plain[0].tensor == 1).all()):
            weights = next(v for v in call.inputs if v is not plain[0])
            if call.op in {"aten.matmul", "aten.mm", "aten.mv"} and weights is call.inputs[0]:
                return Total(weights, (-1,), members, guarded, sink)
    return None


def _order(call: Call) -> float | None:
    order = call.arg("ord", call.arg("p"))
    return float(order) if isinstance(order, int | float) else None


def _added(call: Call, inner: Value) -> float:
    """Return an added constant of the size of the sum, an alternative of fixed energy; 0 for what only guards."""
    others = [a for a in call.args if isinstance(a, int | float)] + [
        float(v.tensor.abs().max()) for v in call.inputs if v is not inner and v.tensor is not None and v.tensor.numel()
    ]
    if not others or inner.tensor is None or not inner.tensor.numel():
        return 0.0
    largest = max(map(abs, others))
    weighs = largest > _GUARD and largest > _SHARE * float(inner.tensor.float().abs().mean())
    return largest if weighs else 0.0


def _fixed_energy(call: Call) -> tuple[Value, set[Call]] | None:
    """Return the other addend and the calls in between where one is exp(c - m), m the maximum that stabilizes a softmax."""
    for shifted, other in (tuple(call.inputs[:2]), tuple(call.inputs[1::-1])) if len(call.inputs) == 2 else ():
        members: set[Call] = set()
        exponential = source(shifted).call
        if exponential is None or exponential.op != "aten.exp":
            continue
        made = source(exponential.inputs[0]).call
        if made is None or made.op not in {"aten.neg", "aten.rsub", "aten.sub"}:
            continue
        value = made.inputs[-1]
        members |= {exponential, made}
        while value.call is not None and (
            value.call.op in CLAMPS or value.call.op in PASS or value.call.op in RESHAPES
        ):
            members.add(value.call)
            value = value.call.inputs[0]
        if value.call is not None and value.call.op in EXTREMUM and not any(computed(v) for v in made.inputs[:-1]):
            return other, members | {value.call}
    return None


def find(trace: Trace) -> list[Ratio]:
    """Return every division of weights, or of a sum under weights, by the weights' own sum over K >= 2 alternatives."""
    found = []
    for call in trace.calls:
        for numerator, denominator, extra in divisions(call):
            sum_found = total(denominator)
            if sum_found is None or not sum_found.weights.param or not sum_found.weights.floating:
                continue
            relation = _relation(numerator, sum_found.weights)
            if relation is None:
                continue
            members = sum_found.members | {call} | extra
            ratio = Ratio(
                call,
                sum_found.weights,
                sum_found.axes,
                relation,
                members,
                denominator,
                sum_found.guarded,
                sum_found.sink,
                sum_found.learned,
                sum_found.segments,
            )
            if ratio.count >= 2 and nonnegative(ratio.weights):
                found.append(ratio)
    return found


def divisions(call: Call) -> list[tuple[Value, Value, set[Call]]]:
    """Return (numerator, denominator, calls in between) of a division, also when written as a product."""
    if call.op in DIVISIONS and len(call.inputs) == 2:
        return [(call.inputs[0], call.inputs[1], set())]
    if call.op not in PRODUCTS or len(call.inputs) != 2:
        return []
    found: list[tuple[Value, Value, set[Call]]] = []
    for numerator, factor in ((call.inputs[0], call.inputs[1]), (call.inputs[1], call.inputs[0])):
        inverse = inverse_of(factor)
        if inverse is not None:
            found.append((numerator, *inverse))
    return found


def inverse_of(value: Value) -> tuple[Value, set[Call]] | None:
    """Return what a value is a constant over, and the calls in between; None if it is no inverse."""
    call = source(value).call
    if call is None:
        return None
    if call.op == "aten.reciprocal" or (call.op == "aten.pow" and call.arg("exponent") == -1):
        return call.inputs[0], {call}
    if call.op in PRODUCTS and len(call.inputs) == 1:
        inner = inverse_of(call.inputs[0])
        return (inner[0], inner[1] | {call}) if inner is not None else None
    if call.op in DIVISIONS and isinstance(call.arg("other"), Value):
        constant, divisor = call.args[0], call.args[1]
        if not (isinstance(constant, Value) and constant.data):
            return divisor, {call}
    return None


def _relation(numerator: Value, weights: Value) -> bool | None:
    """Return True if the numerator is the weights, False if it is a sum of things under them, None if neither."""
    goal = source(weights)
    contracted = {numerator.id: False}
    queue = [numerator]
    for value in queue:
        if same(value, weights) or same(source(value), goal):
            return not contracted[value.id]
        call = value.call
        if call is None or len(queue) > 60:
            continue
        sums = call.op in CONTRACTION or call.op == "aten.sum"
        if sums or call.op in PASS or call.op in RESHAPES or call.op in PRODUCTS or call.op in CLAMPS:
            for parent in call.inputs:
                if parent.id not in contracted:
                    contracted[parent.id] = contracted[value.id] or sums
                    queue.append(parent)
    return None
