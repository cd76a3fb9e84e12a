"""Selection: one of K wins - pooling by maximum, extrema over an axis, argmax, nearest code."""

from __future__ import annotations

import math

from emscan.classify.flow import (
    ADDS,
    CLAMPS,
    DIVISIONS,
    INDEXERS,
    PRODUCTS,
    RESHAPES,
    SCATTERS,
    ancestors,
    computed,
    descendants,
    same,
    source,
)
from emscan.classify.gates import is_guard
from emscan.classify.owners import owner_of, parameters
from emscan.classify.regions import Regions
from emscan.classify.site import Site
from emscan.classify.softmax import EXPONENTIALS, SEGMENTS
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import (
    BINARY_EXTREMUM,
    CONTRACTION,
    CREATES,
    EXTREMUM,
    JOIN,
    MAX_POOL,
    PASS,
    REDUCTION,
    VIEW,
    pointwise,
)
from emscan.trace.origins import is_binary_extremum, is_persistent, reduced_axes

_NUMBERS = frozenset({"aten._local_scalar_dense", "aten.item"})
_BAGS = frozenset({"aten.embedding_bag", "aten._embedding_bag"})  # mode 2 takes the maximum over a bag
_STORES = frozenset({"aten.copy", "emscan.mutated", "aten.index_put", "aten.index_copy"})  # of a state that is kept
_COUNTING = frozenset(
    f"aten.{name}" for name in "one_hot eq nonzero nonzero_numpy argwhere bincount histc sort argsort".split()
)


def find(trace: Trace, regions: Regions, claimed: set[Call]) -> list[Site]:
    """Return the selection sites (routers among them: ``is_router`` tells)."""
    sites: list[Site] = []
    for call in trace.calls:
        if call in claimed or not call.inputs or not (trace.is_live(call) or read_by_python(call)):
            continue
        scores = call.inputs[1] if call.op == "aten.where" and len(call.inputs) == 3 else call.inputs[0]
        if call.op in SEGMENTS:
            scores = call.inputs[-1]
        elif call.op in _BAGS:
            scores = call.out
        if not (computed(scores) and scores.floating):
            continue
        site: Site | None = None
        if call.op in MAX_POOL:
            site = _pool(call)
        elif call.op in BINARY_EXTREMUM or is_binary_extremum(call):
            site = _pairwise(call, regions)
        elif call.op == "aten.where" and len(call.inputs) == 3:
            site = _chosen_by_comparison(call, regions)
        elif call.op in EXTREMUM and not (_only_scales(call) or stabilizes(call)):
            site = _extremum(call, trace)
        elif _wins_apart(call):
            site = Site("hard", "selection", "Max", {call}, scores, call.out, "mode", None, "positions", op=call.op)
        if site is not None and (site.count is None or site.count >= 2):
            sites = [s for s in sites if not s.members < site.members]
            sites.append(site)
    return sites


def _wins_apart(call: Call) -> bool:
    """Whether one of the entries that an index or a bag brings together wins."""
    if call.op in SEGMENTS:
        return str(call.arg("reduce")) in {"amax", "amin"} and not stabilizes(call)
    return call.op in _BAGS and call.arg("mode") == 2


def read_by_python(call: Call) -> bool:
    """Whether a chosen index becomes a Python number, which may choose a branch."""
    if call.op not in EXTREMUM:
        return False
    chosen = [out for out in call.outputs if not out.floating]
    return any(
        user.op in _NUMBERS for out in chosen for user, _ in descendants(out, lambda c: c.op in VIEW or c.op in PASS)
    )


def _pool(call: Call) -> Site:
    """Max-pooling: K = the entries of a window."""
    before, after = call.inputs[0].shape, call.out.shape
    spatial = int(call.op.partition("_pool")[2][:1] or 1)
    if "adaptive" in call.op:
        count = math.prod(-(-b // a) for b, a in zip(before[-spatial:], after[-spatial:], strict=True))
    else:
        size = call.arg("kernel_size")
        sizes = [size] if isinstance(size, int) else list(size)
        count = math.prod(sizes) ** (spatial if len(sizes) == 1 else 1)
    label = f"MaxPool{spatial}d" if "adaptive" not in call.op else f"AdaptiveMaxPool{spatial}d"
    return Site("hard", "selection", label, {call}, call.inputs[0], call.out, "mode", count, "window", op=call.op)


def _pairwise(call: Call, regions: Regions) -> Site | None:
    """The elementwise maximum of two computed values of different origin."""
    a, b = call.inputs[:2]
    if not (computed(a) and computed(b)) or regions.base(a) is regions.base(b):
        return None
    if stabilizes(call) or is_guard(call):
        return None
    members, terms = {call}, 0
    stack = [a, b]
    while stack:  # a chain of maxima is one competition
        made = source(stack.pop()).call
        if made is not None and made.op == call.op and len(made.inputs) == 2 and all(map(computed, made.inputs)):
            members.add(made)
            stack.extend(made.inputs)
        else:
            terms += 1
    return Site("hard", "selection", "Maximum", members, a, call.out, "mode", terms, "units", op=call.op)


def _chosen_by_comparison(call: Call, regions: Regions) -> Site | None:
    """``where(a > b, a, b)`` of two computed values: their maximum (or minimum)."""
    mask, a, b = call.inputs
    made = mask.call
    if made is None or made.op not in {"aten.gt", "aten.ge", "aten.lt", "aten.le"} or len(made.inputs) != 2:
        return None
    if {source(v).id for v in made.inputs} != {source(a).id, source(b).id} or not (computed(a) and computed(b)):
        return None
    if regions.base(a) is regions.base(b):
        return None
    return Site("hard", "selection", "Maximum", {call, made}, a, call.out, "mode", 2, "units", op=call.op)


def _extremum(call: Call, trace: Trace) -> Site | None:
    scores = call.inputs[0]
    rank = len(scores.shape)
    axes = tuple(axis - rank for axis in reduced_axes(call, rank))
    if not axes or call.op in {"aten.cummax", "aten.cummin"}:
        axes = (call.arg("dim", -1) % rank - rank,) if rank else ()
    count = math.prod(scores.shape[axis] for axis in axes)
    live = [out for out in call.outputs if out.id in trace.live] or [v for v in call.outputs if not v.floating]
    chosen = next((out for out in call.outputs if not out.floating), None)
    name = call.op.removeprefix("aten.")
    label = {"argmin": "Argmin", "argmax": "Argmax", "median": "Median", "kthvalue": "K-th value"}.get(
        name, "Min" if "min" in name else "Max"
    )
    if not live:
        return None
    return Site(
        "hard", "selection", label, {call}, scores, live[0], "mode", count, "units", axes=axes, op=call.op,
        chosen=chosen, winner=_winner(call) if chosen is None else None,
    )  # fmt: skip


def _winner(call: Call) -> Value | None:
    """Return the mask of the entries that equal an extremum of theirs."""
    for user, _ in descendants(call.out, lambda c: c.op in PASS or c.op in RESHAPES):
        if user.op in {"aten.eq", "aten.ge", "aten.le"} and any(
            same(source(v), source(call.inputs[0])) for v in user.inputs
        ):
            return user.out
    return None


def stabilizes(call: Call) -> bool:
    """Whether an extremum is used inside exponents alone, and subtracted there: a running maximum of scores."""
    subtracted = raised = False
    for user, operand in descendants(call.out, _inside_exponent):
        if _inside_exponent(user):
            subtracted = subtracted or (user.op in {"aten.sub", "aten.neg"} and user.inputs[-1] is operand)
        elif user.op in EXPONENTIALS:
            raised = True
        elif user.op not in CREATES and user.op not in _STORES:
            return False
    return subtracted and raised


def _inside_exponent(call: Call) -> bool:
    arithmetic = call.op in ADDS or call.op in BINARY_EXTREMUM or call.op == "aten.neg" or is_binary_extremum(call)
    return arithmetic or call.op in PASS or call.op in VIEW or call.op in INDEXERS or call.op in JOIN


def _only_scales(call: Call) -> bool:
    """Whether an extremum only shifts or divides what it was taken from: stabilization or scaling, not a winner."""
    found = False
    scores = source(call.inputs[0])

    def passes(c: Call) -> bool:
        return c.op in PASS or c.op in RESHAPES or c.op in CLAMPS or _spread(c, scores) or _by_constant(c) or _norms(c)

    for user, operand in descendants(call.out, passes):
        if passes(user):
            continue
        subtracts = user.op in {"aten.sub", "aten.subtract"} and user.inputs[0] is not operand
        shifts = subtracts and _related(user.inputs[0], scores)
        added_back = user.op == "aten.add"
        scales = user.op in DIVISIONS and len(user.inputs) > 1 and user.inputs[1] is operand
        if not (shifts or added_back or scales or user.op in PRODUCTS):
            return False
        found = found or shifts or scales
    return found and all(not out.users or out is call.out for out in call.outputs)


def _spread(call: Call, scores: Value) -> bool:
    """Whether a call is the distance of two extrema of the same scores: the spread that a scaling divides by."""
    makers = [source(v).call for v in call.inputs]
    return call.op == "aten.sub" and len(makers) == 2 and all(
        m is not None and m.op in EXTREMUM and _related(m.inputs[0], scores) for m in makers
    )  # fmt: skip


def _norms(call: Call) -> bool:
    """Whether a call multiplies two extrema: the norms that scale a matrix to a contraction."""
    makers = [source(v).call for v in call.inputs]
    return call.op in PRODUCTS and len(makers) == 2 and all(m is not None and m.op in EXTREMUM for m in makers)


def _by_constant(call: Call) -> bool:
    """Whether a call scales or shifts by a number."""
    arithmetic = call.op in DIVISIONS or call.op in PRODUCTS or call.op == "aten.add"
    return arithmetic and sum(v.data for v in call.inputs) == 1 and call.inputs[0].data


def _related(value: Value, scores: Value) -> bool:
    return same(source(value), scores)


def is_router(chosen: Value, axes: Axes, count: int | None, routed: set[Call], scores: set[int]) -> bool:
    """Whether chosen indices select an expert's parameters or an expert's output.

    Parameters that are looked up are an expert's if they then act on the input (a contraction), a code's if they go
    forward themselves. Rows of the input that are sorted out by the chosen index and then meet parameters are an
    expert's input. ``routed``: the calls that see nothing but the scores and what is made of them; ``scores``: the ids
    of these values. Where a choice keeps some of the scores themselves, they are latents, and no expert's output.
    """

    def passes(call: Call) -> bool:
        return call in routed or index_arithmetic(call)

    columns: dict[object, set[tuple[str, ...]]] = {}  # a column of a choice -> the layers whose outputs it multiplies
    for user, operand in descendants(chosen, passes):
        if user.op in INDEXERS and _selects(user, operand):
            table = user.inputs[1] if user.op == "aten.embedding" and operand is user.inputs[0] else user.inputs[0]
            if not table.data and (table.param or table.leaf == "buffer"):
                if _acts_on_input(user.out, scores):
                    return True
            elif table.id in scores and not computed(chosen):
                continue  # the model's input names a score: the label of a cross-entropy, the action that was taken
            elif (table.data and table.param and table.floating and _expert_axis(table, user, axes)) or (
                table.data and operand is not chosen and _meets_parameters(user.out)
            ):
                return True
        elif user.op in CONTRACTION and not operand.floating:  # a grouped product: where each expert's rows end
            if any(v.param and not v.data for v in user.inputs) and any(v.data and v.floating for v in user.inputs):
                return True
        elif (user.op in CONTRACTION or user.op in PRODUCTS) and operand.floating:
            others = [v for v in user.inputs if v is not operand]
            if any(v.data for v in others) and _selects_experts(user, others, axes, count, scores):
                return True
            for column in (_column(operand), *map(_column, others), _number(operand)):
                makers = [owner_of(v) for v in others if computed(v) and v.id not in scores]
                if column is not None:
                    columns.setdefault(column, set()).update(parameters(m) for m in makers if m is not None)
    apart = {names for owners in columns.values() for names in owners}
    return len(columns) >= 2 and len(apart) >= 2 and all(len(owners) == 1 for owners in columns.values())


def _column(value: Value) -> int | None:
    """Return the value that holds one column of a choice, where ``value`` is a view of one."""
    while value.call is not None and (value.call.op in RESHAPES or value.call.op in PASS):
        value = value.call.inputs[0]
    taken = value.call is not None and value.call.op in {
        "aten.select",
        "aten.slice",
        "aten.unbind",
        "aten.split",
        "aten.chunk",
    }
    return value.id if taken else None


def _number(weights: Value) -> object:
    """Return which number a choice is compared with, where weights are zero for all others: ``(index == e) * w``."""
    for value in ancestors(weights, lambda c: c.op in PRODUCTS or c.op in PASS or c.op in VIEW or c.op in REDUCTION):
        call = value.call
        if call is not None and call.op == "aten.eq" and len(call.inputs) == 1 and not call.inputs[0].floating:
            return "eq", call.inputs[0].flow, call.arg("other")
    return None


def _selects(user: Call, operand: Value) -> bool:
    return operand is not user.inputs[0] or user.op == "aten.embedding"


def index_arithmetic(call: Call) -> bool:
    """Whether a call only rearranges indices, counts them, or turns them into masks and one-hot rows."""
    if call.op in VIEW or call.op in PASS or call.op in _COUNTING or call.op in SCATTERS or call.op in JOIN:
        return True
    if call.op in REDUCTION and not (call.inputs[0].floating and call.out.floating):
        return True
    if call.op in {"aten.add", "aten.sub"} and call.outputs:  # h - detach(y) + y is h in numbers
        return _one_hot(call.out) or any(_one_hot(u.out) for u in call.out.users if u.op in {"aten.add", "aten.sub"})
    return (pointwise(call.op) and not any(v.floating and computed(v) for v in call.inputs)) or (
        call.op in INDEXERS and not call.inputs[0].floating
    )


def _one_hot(value: Value) -> bool:
    """Whether the numbers are zeros and ones, a single one along the last axis, as a hard choice is."""
    tensor = value.tensor
    if tensor is None or not tensor.dim() or not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    near = ((tensor.abs() < 1e-5) | ((tensor - 1).abs() < 1e-5)).all()
    return bool(near) and bool(((tensor.sum(-1) - 1).abs() < 1e-4).all())


def _acts_on_input(value: Value, scores: set[int]) -> bool:
    """Whether looked-up parameters are contracted with something computed from the input, other than the scores."""
    for user, operand in descendants(value, lambda c: c.op in VIEW or c.op in PASS):
        if user.op in CONTRACTION and any(v.data and v.id not in scores for v in user.inputs if v is not operand):
            return user.op not in {"aten.cdist"}
        if user.op in PRODUCTS and any(v.data and v.id not in scores and v is not operand for v in user.inputs):
            return any(c.op == "aten.sum" for c in user.out.users)
    return False


def _meets_parameters(value: Value, depth: int = 6) -> bool:
    layer = [value]
    for _ in range(depth):
        following: list[Value] = []
        for item in layer:
            for user in item.users:
                if user.op in CONTRACTION and any(v.param and not v.data for v in user.inputs if v is not item):
                    return True
                if user.op in VIEW or user.op in PASS or user.op in INDEXERS:
                    following.extend(user.outputs)
        layer = following
    return False


def _expert_axis(table: Value, user: Call, axes: Axes) -> bool:
    """Whether the axis that is indexed runs over outputs of different parameters."""
    dim = user.arg("dim", 0)
    if user.op == "aten.index":
        places = [d for d, index in enumerate(user.args[1]) if isinstance(index, Value) and computed(index)]
        dim = places[-1] if places else 0
    dims = axes.of(table)
    return isinstance(dim, int) and bool(dims) and is_persistent(dims[dim % len(dims)])


def _selects_experts(user: Call, others: list[Value], axes: Axes, count: int | None, scores: set[int]) -> bool:
    """Whether a one-hot choice meets parameters: in the same contraction, in the next layer, or in K experts' outputs."""
    if any(v.param and not v.data for v in others):
        return True
    mixed = others if user.op in CONTRACTION else [v for v in others if v.id not in scores]
    if _mixes_experts(mixed, axes, count):
        return True
    # one number for a whole row of an expert's input; a mask of single features is no router
    wide = user.op in CONTRACTION or any(math.prod(v.shape) > math.prod(user.out.shape) // 2 for v in others)
    narrow = user.op in CONTRACTION or any(math.prod(v.shape) < math.prod(user.out.shape) for v in user.inputs)
    return wide and narrow and _meets_parameters(user.out)


def _mixes_experts(others: list[Value], axes: Axes, count: int | None) -> bool:
    """Whether a one-hot choice multiplies computed values along an axis of K parameter groups."""
    return any(
        v.data and v.param and any(is_persistent(dim) and math.prod(f.size for f in dim) == count for dim in axes.of(v))
        for v in others
    )
