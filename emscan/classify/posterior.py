"""The posterior of a router before truncation: what its weights are, over all experts.

The weights of the chosen experts are taken from scores as wide as all of them. Where these are shares already (a softmax,
sigmoids), they are the posterior; where a softmax or sigmoid follows on the chosen alone, the same function over all
experts is. A bias that only steers the choice has no part in it, nor have the groups that a choice is limited to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from emscan.classify.flow import (
    DIVISIONS,
    INDEXERS,
    MASKS,
    PRODUCTS,
    RESHAPES,
    SCATTERS,
    carries,
    computed,
    descendants,
    source,
)
from emscan.classify.site import Choice, Posterior, Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Value
from emscan.trace.operators import EXTREMUM, PASS, RANKING, SOFTMAX, VIEW, pointwise

_LINEAR = frozenset(f"aten.{name}" for name in "mul multiply div divide true_divide add sub rsub neg clone".split())


def before_truncation(
    site: Site, choices: list[Choice], sites: list[Site], axes: Axes, routed: set[Call]
) -> Posterior | None:
    """Return the posterior that the weights of a router's choices are taken from; None where no dataflow shows it."""
    calls = sorted(routed | site.members, key=lambda c: c.id)
    for weights, kept in _taken(choices, calls):
        axis = _axis(weights, site, axes)
        if axis is None:
            continue
        found = _posterior(weights, kept, axis, sites, routed | site.members)
        if found is not None:
            found.labels = next((c.labels for c in choices if c.labels is not None), None)
            return found
    return None


def _taken(choices: list[Choice], calls: list[Call]) -> Iterator[tuple[Value, Value]]:
    """Yield (scores of all experts, what is kept of them): looked up, masked, or handed out by the ranking itself."""
    picked = _indices(choices, calls)
    ranked = [c for c in calls if c.op in RANKING | EXTREMUM and any(out.id in picked for out in c.outputs)]
    chosen = _outcome(picked, ranked, calls)
    for call in calls:
        if call.op in INDEXERS and any(v.id in picked for v in call.inputs[1:]) and _scores(call.inputs[0], chosen):
            yield call.inputs[0], call.out
    for call in calls:
        if call.op in PRODUCTS | MASKS and any(v.id in picked for v in call.inputs):
            whole = [v for v in call.inputs if _scores(v, chosen)]
            if len(whole) == 1 and call.out.shape == whole[0].shape:
                yield whole[0], call.out
    for call in ranked:
        for out in call.outputs:
            if out.floating and (out.users or call.op in RANKING):
                yield call.inputs[0], out


def _scores(value: Value, chosen: set[int]) -> bool:
    """Whether a value holds scores in which no choice has had part yet."""
    return value.floating and computed(value) and value.id not in chosen


def _indices(choices: list[Choice], calls: list[Call]) -> set[int]:
    """Return the ids of the choices and of the indices and masks made of them alone."""
    made = {value.id for choice in choices for value in (choice.value, choice.place) if value is not None}
    for call in calls:
        inputs = [v for v in call.inputs if computed(v)]
        if inputs and all(v.id in made for v in inputs):
            made.update(out.id for out in call.outputs)
    return made


def _outcome(picked: set[int], ranked: list[Call], calls: list[Call]) -> set[int]:
    """Return the ids of all values in which a choice has had part."""
    chosen = picked | {out.id for call in ranked for out in call.outputs}
    for call in calls:
        if any(v.id in chosen for v in call.inputs):
            chosen.update(out.id for out in call.outputs)
    return chosen


def _axis(value: Value, site: Site, axes: Axes) -> int | None:
    """Return the axis (negative) of a value that runs over the experts, by where it comes from."""
    fitting = [-1 - n for n, size in enumerate(reversed(value.shape)) if size == site.count]
    along = axes.of(site.energies)[site.axes[0]]
    origins = {f.origin.id for f in along}
    alike = [a for a in fitting if origins & {f.origin.id for f in axes.of(value)[a]}]
    if alike:
        return alike[0]
    return site.axes[0] if site.axes[0] in fitting else None


def _posterior(weights: Value, kept: Value, axis: int, sites: list[Site], calls: set[Call]) -> Posterior | None:
    value = _unmasked(weights)
    made = source(value)
    soft = next((s for s in sites if s.mechanism == "softmax" and source(s.emitted) is made), None)
    if made.call is not None and made.call.op in SOFTMAX and "log" not in made.call.op:
        return Posterior(_unmasked(made.call.inputs[0]), "softmax", axis)  # from the scores: in more than their dtype
    if soft is not None and soft.statistic == "vector":
        return Posterior(value, "shares", axis)
    after = _first_after(kept, sites, calls)
    if after == "softmax" or not _bent(value, calls):
        return Posterior(value, "sigmoid" if after == "sigmoid" else "softmax", axis)
    return Posterior(value, "shares", axis) if _nonnegative(value) else Posterior(value, "softmax", axis)


def _unmasked(value: Value) -> Value:
    """Return the scores before a mask that a choice has made left some of them out."""
    base = item = value
    while item.call is not None:
        call = item.call
        if call.op in PASS or call.op in RESHAPES:
            item = call.inputs[0]
            continue
        masked = call.op in MASKS or call.op in SCATTERS or (call.op in PRODUCTS and _by_mask(call))
        scores = [v for v in call.inputs if v.floating and computed(v) and not _binary(v)]
        if not masked or len(scores) != 1 or scores[0].shape != call.out.shape:
            break
        if not any(computed(v) for v in call.inputs if v is not scores[0]):
            break  # a mask that is given says which experts there are
        base = item = scores[0]
    return base


def _by_mask(call: Call) -> bool:
    return any(computed(v) and _binary(v) for v in call.inputs)


def _binary(value: Value) -> bool:
    """Whether a value holds zeros and ones alone."""
    tensor = value.tensor
    return tensor is not None and tensor.numel() > 0 and bool(((tensor == 0) | (tensor == 1)).all())


def _bent(value: Value, calls: set[Call]) -> bool:
    """Whether something other than scales and shifts lies between the scores of the layer and ``value``."""
    queue, seen = [value], {value.id}
    for item in queue:
        call = item.call
        if call is None or call not in calls:
            continue
        if not (call.op in PASS or call.op in VIEW or call.op in _LINEAR or not carries(call)):
            return True
        if call.op in DIVISIONS and computed(call.inputs[-1]):
            return True
        for parent in call.inputs:
            if computed(parent) and parent.floating and parent.id not in seen:
                seen.add(parent.id)
                queue.append(parent)
    return False


def _nonnegative(value: Value) -> bool:
    tensor = value.tensor
    return tensor is None or tensor.numel() == 0 or bool((tensor >= 0).all())


def _first_after(kept: Value, sites: list[Site], calls: set[Call]) -> str | None:
    """Return what the kept scores meet first: "softmax" over them, or a "sigmoid" of each."""
    for user, operand in descendants(kept, lambda c: c in calls and (carries(c) or c.op in PASS) and not _bends(c)):
        if user.op in SOFTMAX:
            return "softmax"
        for site in sites:
            if user not in site.members or not (site.energies is operand or source(site.energies) is source(operand)):
                continue
            if site.mechanism == "softmax":
                return "softmax"
            if site.mechanism in {"logistic", "kernel"} and _is_sigmoid(site):
                return "sigmoid"
    return None


def _bends(call: Call) -> bool:
    return pointwise(call.op) and not (call.op in PASS or call.op in _LINEAR or call.op in MASKS)


def _is_sigmoid(site: Site) -> bool:
    """Whether what a gate hands out, or a kernel normalizes, is r of the upper side or its log, in numbers."""
    given = site.weights if site.mechanism == "kernel" else site.emitted
    if given is None or given.tensor is None or site.energies.tensor is None or given.shape != site.energies.shape:
        return False
    odds = site.form.log_odds if site.form is not None else None
    scores, made = site.energies.tensor.double(), given.tensor.double()
    r = torch.sigmoid(odds(scores) if odds is not None else scores)
    return bool(torch.allclose(r, made, atol=1e-3)) or bool(torch.allclose(r, made.exp(), atol=1e-3))
