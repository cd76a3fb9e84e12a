"""Which experts a router finally chose, over all its choices, and which of them a limited capacity left out.

A router may choose more than once (the best, then the best of the rest), choose among groups first, or look its experts
up from candidates. The choices that count are those whose indices reach the experts without another ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from emscan.classify.flow import INDEXERS, PRODUCTS, SCATTERS, ancestors, computed, descendants, onward
from emscan.classify.selection import is_router
from emscan.classify.site import Choice, Cut, Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Value
from emscan.trace.operators import EXTREMUM, JOIN, PASS, RANKING, REDUCTION, VIEW, pointwise

_COMPARES = frozenset(f"aten.{name}" for name in "lt le gt ge less less_equal greater greater_equal".split())
_ABOVE = frozenset(f"aten.{name}" for name in "gt ge greater greater_equal".split())
_COUNTS = frozenset({"aten.cumsum"})
_APPLIES = frozenset(
    f"aten.{name}" for name in "mul multiply logical_and bitwise_and __and__ where masked_fill".split()
)
_NEGATES = frozenset(f"aten.{name}" for name in "logical_not bitwise_not".split())
_MADE = frozenset(
    f"aten.{name}" for name in "one_hot nonzero nonzero_numpy argwhere bincount histc sort argsort".split()
)


def of_router(site: Site, alone: list[Site], axes: Axes, routed: set[Call], scores: set[int]) -> list[Choice]:
    """Return the choices of a router among as many experts as its scores are wide; ``alone``: the sites inside it."""
    straight = {c for c in routed if not (c.op in RANKING | EXTREMUM and c.inputs and c.inputs[0].floating)}
    wide = [s for s in (site, *alone) if s.count == site.count and len(s.axes) == 1 and _index(s) is not None]
    found: list[Choice] = []
    for one in sorted(wide, key=lambda s: s.first):
        choice = _choice(one)
        if one.kind != "experts" or not is_router(choice.value, axes, one.count, straight, scores):
            continue
        found = [c for c in found if not _narrows(choice, c)]
        if not any(_narrows(c, choice) for c in found):
            found.append(choice)
    for one in wide:  # a further choice may go on by its weights alone
        choice = _choice(one)
        if choice.value.id in {c.value.id for c in found} or not _weighs(choice.value, straight, scores):
            continue
        if found and all(_disjoint(choice, c) for c in found):
            found.append(choice)
    return [_looked_up(choice) for choice in found or [_choice(s) for s in wide if s is site]]


def _index(site: Site) -> Value | None:
    return site.chosen if site.chosen is not None else site.winner


def _rows(choice: Choice) -> Tensor | None:
    """Return the indices chosen in the discovery run, one row per competition: (n, k)."""
    tensor = choice.value.tensor
    if tensor is None or choice.mask:
        return None
    if choice.whole:
        moved = tensor.movedim(choice.axis, -1)
        return moved.reshape(-1, moved.shape[-1])[:, : choice.kept]
    return tensor.reshape(-1, 1)


def _narrows(choice: Choice, other: Choice) -> bool:
    """Whether everything in ``choice`` was chosen by ``other`` before: the last word is the narrower one's."""
    mine, theirs = _rows(choice), _rows(other)
    if mine is None or theirs is None or len(mine) != len(theirs):
        return False
    return bool((mine[:, :, None] == theirs[:, None, :]).any(-1).all())


def _disjoint(choice: Choice, other: Choice) -> bool:
    mine, theirs = _rows(choice), _rows(other)
    if mine is None or theirs is None or len(mine) != len(theirs):
        return False
    return not bool((mine[:, :, None] == theirs[:, None, :]).any())


def _weighs(chosen: Value, straight: set[Call], scores: set[int]) -> bool:
    """Whether weights made of a choice multiply something that is no score: an expert's output."""
    return any(
        user.op in PRODUCTS and any(computed(v) and v.floating and v.id not in scores for v in user.inputs)
        for user, operand in descendants(chosen, lambda c: c in straight or c.op in INDEXERS)
        if operand.floating and user not in straight
    )


def _choice(site: Site) -> Choice:
    value = _index(site)
    assert value is not None
    whole = len(value.shape) == len(site.energies.shape)
    kept = site.kept if whole and site.kept is not None and value.shape[site.axes[0]] > site.kept else None
    mask = site.chosen is None
    return Choice(value, site.axes[0], kept, mask, site.inverted, whole)


def _looked_up(choice: Choice) -> Choice:
    """Follow an index into a list of candidates that the model has computed to the expert that stands there."""
    for user, operand in descendants(choice.value, lambda c: c.op in VIEW or c.op in PASS):
        table = user.inputs[0] if user.inputs else None
        if user.op not in INDEXERS or table is None or table is operand or not computed(table) or table.floating:
            continue
        if choice.value not in ancestors(table, _always):  # else it is something counted of the choice itself
            return Choice(user.out, choice.axis, None, labels=table, place=choice.value)
    return choice


def _always(_call: Call) -> bool:
    return True


def among_groups(count: int, indices: list[Value], axes: Axes, routed: set[Call], scores: set[int]) -> list[Choice]:
    """Return the index of an expert that a router has put together from the ``indices`` of its group and in there."""
    made = {value.id for value in indices}

    def accepts(call: Call) -> bool:
        moved = call.op in VIEW or call.op in PASS or call.op in JOIN or call.op in INDEXERS or pointwise(call.op)
        inputs = [v for v in call.inputs if computed(v)]
        if not (moved and inputs and all(v.id in made for v in inputs)) or call.out.floating or _is_mask(call.out):
            return False
        made.update(out.id for out in call.outputs)
        return True

    calls = onward(indices, accepts)
    straight = {c for c in routed if not (c.op in RANKING | EXTREMUM and c.inputs and c.inputs[0].floating)}
    ends = [c.out for c in calls if not (c.op in VIEW or c.op in PASS) and not any(u in calls for u in c.out.users)]
    for value in sorted(ends, key=lambda v: -v.id):
        if _below(value, count) and is_router(value, axes, count, straight, scores):
            return [Choice(value, -1)]
    return []


def _is_mask(value: Value) -> bool:
    return str(value.dtype) == "torch.bool"


def _below(value: Value, count: int) -> bool:
    tensor = value.tensor
    return tensor is None or tensor.numel() == 0 or (int(tensor.min()) >= 0 and int(tensor.max()) < count)


def capacity_cuts(choices: list[Choice]) -> list[Cut]:
    """Return where assignments beyond an expert's capacity are left out.

    An assignment's place in its expert's queue is a running count of what was chosen; it is compared with a number, and
    what is beyond is masked or taken out. A list of rows that Python cuts short is not seen.
    """
    made = {choice.value.id for choice in choices}

    def accepts(call: Call) -> bool:
        inputs = [v for v in call.inputs if computed(v)]
        if not inputs or not all(v.id in made for v in inputs) or not call.outputs or not _counting(call):
            return False
        made.update(out.id for out in call.outputs)
        return True

    calls = sorted(onward([choice.value for choice in choices], accepts), key=lambda c: c.id)
    found: dict[int, Cut] = {}
    for call in calls:
        if (call.op in _COMPARES or call.op == "aten.eq") and _is_limit(call, made):
            for cut in _masked(call, made):
                found.setdefault(cut.after.id, cut)
    return list(found.values())


def _counting(call: Call) -> bool:
    """Whether a call keeps to indices, masks, counts and places of what was chosen."""
    listed = call.op in VIEW or call.op in PASS or call.op in JOIN or call.op in _MADE or call.op in REDUCTION
    return listed or call.op in INDEXERS or call.op in SCATTERS or call.op == "emscan.mutated" or pointwise(call.op)


def _is_limit(call: Call, made: set[int]) -> bool:
    """Whether a running count is compared with a number."""
    counted = [v for v in call.inputs if v.id in made]
    if len(counted) != 1 or any(computed(v) and v.id not in made for v in call.inputs):
        return False
    if call.op == "aten.eq" and (len(call.inputs) < 2 or math.prod(call.out.shape) <= math.prod(counted[0].shape)):
        return False  # a place that is compared with every slot an expert has; a single number tells experts apart
    return any(v.call is not None and v.call.op in _COUNTS for v in ancestors(counted[0], lambda c: _stays(c, made)))


def _stays(call: Call, made: set[int]) -> bool:
    """Whether a count stays one: what a comparison has masked is no longer a place in a queue."""
    return any(v.id in made for v in call.inputs) and call.op not in _COUNTS | _COMPARES


def _masked(call: Call, made: set[int]) -> Iterator[Cut]:
    """Yield the products of what was assigned with whether it is within the limit; the comparison itself if none."""
    keeps = (call.op in _ABOVE) != bool(call.inputs and call.inputs[0].id in made)
    queue, seen, applied = [(call.out, keeps or call.op == "aten.eq")], {call.out.id}, []
    for value, keep in queue:
        for user in value.users:
            if not user.outputs or user.out.id in seen:
                continue
            seen.add(user.out.id)
            others = [v for v in user.inputs if v is not value and computed(v)]
            if user.op in PASS or user.op in VIEW or user.op in _NEGATES:
                queue.append((user.out, keep != (user.op in _NEGATES)))
            elif user.op in _APPLIES and len(others) == 1 and len(others[0].shape) == len(value.shape):
                applied.append((others[0], user))
    own = [(other, user) for other, user in applied if other.id in made and _assigns(other)]
    for other, user in (own or [a for a in applied if _assigns(a[0])])[:1]:
        yield Cut(other, user.out)
    if not own and not any(_assigns(a[0]) for a in applied) and call.op != "aten.eq":
        yield Cut(call.out, call.out, keeps=keeps)


def _assigns(value: Value) -> bool:
    """Whether a value is a mask of assignments (zero where there is none) rather than a list of indices."""
    tensor = value.tensor
    if tensor is None:
        return True
    if tensor.is_floating_point():
        return bool((tensor == 0).any())
    return bool(((tensor == 0) | (tensor == 1)).all())
