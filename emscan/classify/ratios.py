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
_TURNS = frozenset(f"aten.{name}" for name in "t mT T numpy_T transpose swapaxes".split())  # their own inverses
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
    def emitted(self) -> Value:
        """What the division hands out, turned back where it was turned to divide: (k.T / k.sum(1)).T."""
        turned = self.call.inputs[0].call if self.vector and self.call.inputs else None
        if turned is None or turned.op not in _TURNS or turned.inputs[0] is not self.weights:
            return self.call.out
        return next((user.out for user in self.call.out.users if user.op == turned.op), self.call.out)

    @property
    def count(self) -> int:
        """Number of alternatives; of all segments together where the sums run over segments."""
        return math.prod(self.weights.shape[axis] for axis in self.axes)

    def site(self, mechanism: Mechanism, label: str, members: set[Call], energies: Value, op: str) -> Site:
        """Return the site of these weights over their sum."""
        count = None if self.segments is not None else self.count + self.sink
        return Site(
            "em", mechanism, label, members, energies, self.emitted, "vector" if self.vector else "mean", count, "units",
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
    found = Total(value, (), set())
    while found.weights.call is not None and _strip(found, found.weights.call):
        pass
    call = found.weights.call
    if call is None:
        return None
    found.members.add(call)
    summed = _summed(call, mean=mean)
    if summed is None:
        return None
    found.weights, found.axes, found.segments = summed
    if found.segments is not None:
        found.members.add(found.segments)
    return found if found.axes else None


def _strip(found: Total, call: Call) -> bool:
    """Take a guard, a view or an added alternative off a sum; say whether there was one."""
    if call.op in PASS or call.op in RESHAPES or call.op in CLAMPS:
        found.guarded = found.guarded or call.op in CLAMPS
        found.weights = call.inputs[0]
    elif call.op in ADDS and call.op != "aten.rsub" and variables(call) <= 1 and len(call.inputs) <= 2:
        inner = next((v for v in call.inputs if computed(v)), call.inputs[0])
        weight = _added(call, inner)
        found.constant += weight
        found.sink, found.guarded = found.sink or weight > 0, True
        found.learned = found.learned or (weight > 0 and any(v.param for v in call.inputs if v is not inner))
        found.members.add(call)
        found.weights = inner
    elif call.op == "aten.add" and (fixed := _fixed_energy(call)) is not None:
        found.weights, extra = fixed
        found.learned = found.learned or any(v.param and not v.data for c in extra for v in c.inputs)
        found.members |= {call} | extra
        found.sink = found.guarded = True
    else:
        return False
    return True


def _summed(call: Call, *, mean: bool) -> tuple[Value, tuple[int, ...], Call | None] | None:
    """Return what a call sums, over which axes (negative), and the scatter that sums where it is by index."""
    weights = call.inputs[0] if call.inputs else None
    if weights is None:
        return None
    plain_sum = call.op == "aten.sum" or (mean and call.op == "aten.mean")
    if plain_sum or (call.op in {"aten.linalg_vector_norm", "aten.norm"} and _order(call) == 1):
        rank = len(weights.shape)
        return weights, tuple(axis - rank for axis in reduced_axes(call, rank)), None
    if call.op in INDEXERS:
        return _by_index(source(weights).call)
    if call.op in {"aten.matmul", "aten.mm", "aten.mv"} and len(call.inputs) == 2:
        if _ones(call.inputs[1]):  # e @ ones
            return weights, (-1,), None
        if _ones(weights) and len(call.inputs[1].shape) >= 2:  # ones @ e
            return call.inputs[1], (-2,), None
    if call.op == "aten.einsum":
        return _by_subscripts(call)
    if call.op in PRODUCTS:
        return _scaled_mean(call)
    return None


def _ones(value: Value) -> bool:
    constant = not value.data and not value.param and value.tensor is not None
    return constant and value.tensor is not None and bool((value.tensor == 1).all())


def _by_subscripts(call: Call) -> tuple[Value, tuple[int, ...], None] | None:
    """A sum written as einsum: letters of one operand that the result lacks; all other operands are ones."""
    parsed = _subscripts(call)
    if parsed is None:
        return None
    *operands, result = parsed
    real = [(value, letters) for value, letters in zip(call.inputs, operands, strict=False) if not _ones(value)]
    if len(real) != 1 or not set(result) <= set(real[0][1]):
        return None
    value, letters = real[0]
    gone = tuple(place - len(letters) for place, letter in enumerate(letters) if letter not in result)
    return value, gone, None


def _subscripts(call: Call) -> list[str] | None:
    """Return the letters of every operand and of the result, an ellipsis spelled out; None where one occurs twice."""
    equation = call.arg("equation")
    if not isinstance(equation, str) or "->" not in equation:
        return None
    left, result = equation.replace(" ", "").split("->")
    parts = left.split(",")
    if len(parts) != len(call.inputs):
        return None
    spare = [chr(code) for code in range(0x100, 0x140)]
    wide = max((len(v.shape) - len(p) + 3 for v, p in zip(call.inputs, parts, strict=True) if "..." in p), default=0)
    found = []
    for letters, rank in [*((p, len(v.shape)) for p, v in zip(parts, call.inputs, strict=True)), (result, None)]:
        width = wide if rank is None else rank - len(letters) + 3
        spelled = letters.replace("...", "".join(spare[wide - width : wide]))
        if len(set(spelled)) != len(spelled):
            return None
        found.append(spelled)
    return found


def _scaled_mean(call: Call) -> tuple[Value, tuple[int, ...], None] | None:
    """A mean times the number of its terms."""
    numbers = [a for a in call.args if isinstance(a, int | float)]
    made = source(call.inputs[0]).call if len(call.inputs) == 1 and len(numbers) == 1 else None
    if made is None or made.op != "aten.mean":
        return None
    value, rank = made.inputs[0], len(made.inputs[0].shape)
    axes = tuple(axis - rank for axis in reduced_axes(made, rank))
    return (value, axes, None) if math.prod(value.shape[axis] for axis in axes) == numbers[0] else None


def _by_index(scatter: Call | None) -> tuple[Value, tuple[int, ...], Call | None] | None:
    if scatter is None or scatter.op not in _SEGMENT_SUMS or len(scatter.inputs) != 3 or scatter.inputs[0].data:
        return None
    if scatter.op == "aten.scatter_reduce" and scatter.arg("reduce") != "sum":
        return None
    weights, axis = scatter.inputs[2], scatter.arg("dim", 0)
    return weights, (axis % len(weights.shape) - len(weights.shape),) if weights.shape else (), scatter


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
    if len(call.inputs) != 2 or not (call.op in PRODUCTS or _multiplies(call)):
        return []
    found: list[tuple[Value, Value, set[Call]]] = []
    for numerator, factor in ((call.inputs[0], call.inputs[1]), (call.inputs[1], call.inputs[0])):
        inverse = inverse_of(factor)
        if inverse is not None:
            found.append((numerator, *inverse))
    return found


def _multiplies(call: Call) -> bool:
    """Whether an einsum is a plain product of a tensor of the result's shape with another one, spread over it."""
    parsed = _subscripts(call) if call.op == "aten.einsum" else None
    return parsed is not None and parsed[-1] in parsed[:-1] and set("".join(parsed[:-1])) == set(parsed[-1])


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
        if call.op in PRODUCTS and len(call.inputs) == 2 and same(source(call.inputs[0]), source(call.inputs[1])):
            continue  # squares of the weights: their own sum is another one
        sums = call.op in CONTRACTION or call.op == "aten.sum"
        if sums or call.op in PASS or call.op in RESHAPES or call.op in PRODUCTS or call.op in CLAMPS:
            for parent in call.inputs:
                if parent.id not in contracted:
                    contracted[parent.id] = contracted[value.id] or sums
                    queue.append(parent)
    return None
