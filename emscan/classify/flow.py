"""Walking along the dataflow: through views, casts and scalings, forwards and backwards."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from emscan.trace.graph import Call, Value
from emscan.trace.operators import CONTRACTION, JOIN, LOOKUP, PASS, VIEW, pointwise

RESHAPES = VIEW - frozenset(
    f"aten.{name}" for name in "select slice narrow chunk split split_with_sizes unbind".split()
)
CLAMPS = frozenset(f"aten.{name}" for name in "clamp clamp_min clamp_max clip maximum nan_to_num".split())
ADDS = frozenset(f"aten.{name}" for name in "add sub rsub subtract".split())
PRODUCTS = frozenset(f"aten.{name}" for name in "mul multiply".split())
DIVISIONS = frozenset(f"aten.{name}" for name in "div divide true_divide".split())
MASKS = frozenset(f"aten.{name}" for name in "where masked_fill".split())
SCATTERS = frozenset(f"aten.{name}" for name in "scatter scatter_add index_put masked_scatter index_fill".split())
INDEXERS = frozenset(f"aten.{name}" for name in "index index_select gather take_along_dim embedding take".split())


def source(value: Value, *, clamps: bool = False) -> Value:
    """Return what ``value`` is a view, cast or copy of (through clamps and added constants too, if asked)."""
    while value.call is not None:
        call = value.call
        if call.op in PASS or call.op in RESHAPES or (clamps and call.op in CLAMPS):
            value = call.inputs[0]
        elif clamps and call.op in ADDS and variables(call) == 1:
            value = next(v for v in call.inputs if computed(v))
        else:
            break
    return value


def computed(value: Value) -> bool:
    """Whether a value depends on input and parameters both."""
    return value.data and value.param


def variables(call: Call) -> int:
    """Return how many of a call's operands were computed."""
    return sum(computed(v) for v in call.inputs)


def same(a: Value, b: Value) -> bool:
    """Whether two values are the same computation on the same numbers."""
    if a is b:
        return True
    return a.flow == b.flow and a.shape == b.shape


def ancestors(value: Value, through: Callable[[Call], bool], limit: int = 400) -> Iterator[Value]:
    """Yield ``value`` and what it was made from, breadth first, through the calls that ``through`` admits."""
    queue, seen = [value], {value.id}
    for item in queue:
        yield item
        if item.call is None or len(queue) > limit or not through(item.call):
            continue
        for parent in item.call.inputs:
            if parent.id not in seen:
                seen.add(parent.id)
                queue.append(parent)


def descendants(value: Value, through: Callable[[Call], bool], limit: int = 400) -> Iterator[tuple[Call, Value]]:
    """Yield (user, operand) for every use of ``value`` and of what is made of it through admitted calls."""
    queue, seen = [value], {value.id}
    for item in queue:
        for user in item.users:
            yield user, item
            if len(queue) <= limit and through(user):
                for output in user.outputs:
                    if output.id not in seen:
                        seen.add(output.id)
                        queue.append(output)


def onward(starts: Iterable[Value], accepts: Callable[[Call], bool]) -> set[Call]:
    """Return the calls that use ``starts`` or what accepted calls made, in the order of the run, where ``accepts`` agrees."""
    found: set[Call] = set()
    waiting: list[tuple[int, Call]] = []
    seen: set[int] = set()

    def add(value: Value) -> None:
        for user in value.users:
            if user.id not in seen:
                seen.add(user.id)
                heapq.heappush(waiting, (user.id, user))

    for value in starts:
        add(value)
    while waiting:
        _, call = heapq.heappop(waiting)
        if accepts(call):
            found.add(call)
            for output in call.outputs:
                add(output)
    return found


def carries(call: Call) -> bool:
    """Whether a call passes scores on entry by entry: views, casts, arithmetic, masks, scatters."""
    return (
        call.op in VIEW or pointwise(call.op) or call.op in SCATTERS or call.op in JOIN or call.op == "emscan.mutated"
    )


def mixes(call: Call) -> bool:
    """Whether a call computes new energies: a contraction or a lookup."""
    return call.op in CONTRACTION or call.op in LOOKUP


def cut_off(value: Value) -> bool:
    """Whether every way back from energies to a parameter is cut: no gradient reaches one."""
    if value.leaf == "param":
        return False
    queue, seen = [value], {value.id}
    for item in queue:
        if item.leaf is not None and item.param:
            return False
        if item.call is None or item.call.op == "aten.detach" or item.call.no_grad:
            continue
        for parent in item.call.inputs:
            if parent.param and parent.id not in seen:
                seen.add(parent.id)
                queue.append(parent)
    return value.param
