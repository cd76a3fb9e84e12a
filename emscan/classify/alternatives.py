"""What the alternatives of a site are, and which layer computes their energies."""

from __future__ import annotations

import math

from emscan.classify import owners
from emscan.classify.flow import INDEXERS, ancestors, carries, computed, descendants, source
from emscan.classify.selection import index_arithmetic
from emscan.classify.site import Site
from emscan.classify.softmax import SEGMENTS
from emscan.report.document import AlternativeKind
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import CONTRACTION, JOIN, LOOKUP, PASS, RECURRENT, REDUCTION, SDPA, VIEW, pointwise
from emscan.trace.origins import Dim, Origin, is_persistent


def place(site: Site, axes: Axes, trace: Trace) -> None:
    """Find the owner of a site and what its alternatives are."""
    if site.attention is not None:
        query, key = site.attention.inputs[:2]
        asked, held = owners.owner_of(query), owners.owner_of(key)
        site.owner = asked or held
        names = [n for call in (asked, held) if call is not None for n in owners.parameters(call)]
        site.owner_names = tuple(dict.fromkeys(names))
        return
    if site.owner is None:
        site.owner = _maker_of_axis(site, axes) or owners.owner_of(site.energies)
    if site.owner is not None:
        site.owner_names = owners.parameters(site.owner) or owners.tables(site.owner)
    elif site.energies.param and not site.energies.data:
        site.owner_names = _leaves(site.energies)
    if not site.members:  # what an objective adds knows its alternatives
        return
    if (
        site.terms
        or site.numerator is not None
        or site.mechanism in {"logistic", "threshold", "smooth-gate"}
        or site.kind in {"window", "experts", "classes"}
        or "contrast" in site.flags
        or site.op in SEGMENTS
        or site.segments is not None
    ):
        if site.segments is not None:
            site.kind = "positions"
        site.persistent = site.kind in {"experts", "classes"}
        if site.terms:
            site.terms.sort(key=lambda value: value.id)  # the order of the run is that of the components
            sources = _sources(site.terms)
            site.persistent = all(sources) and len(set(sources)) == len(sources)
            if site.persistent and _distance(site.owner):
                site.kind = "prototypes"
        return
    site.kind, site.persistent = _kind(site, axes, trace)
    if site.verdict == "em" and _joins_parameter(site):
        site.notes.append("one alternative is a sink of learned energy")
    if site.statistic == "vector" and site.verdict == "em" and _averages(site, trace):
        site.statistic = "mean"


def _sources(terms: list[Value]) -> list[tuple[object, ...]]:
    """Return what parameters, and which part of them, the alternatives come from that stand in values of their own."""
    above = [{v.call for v in ancestors(term, _computes) if v.call is not None} for term in terms]
    shared = set.intersection(*above)
    return [tuple(part for call in sorted(own - shared, key=lambda c: c.id) for part in _parts(call)) for own in above]


def _computes(call: Call) -> bool:
    """Whether a call works on the input."""
    return any(v.data for v in call.inputs)


def _parts(call: Call) -> list[object]:
    """Return the names of the parameters that meet computed values in a call, and the places taken from them."""
    if not _computes(call):
        return []
    found: list[object] = []
    stack = [v for v in call.inputs if v.param and not v.data]
    while stack:
        value = stack.pop()
        if value.call is None:
            found.append(value.name)
        else:
            found += [value.index, *(a for a in value.call.args if isinstance(a, int))]
            stack.extend(value.call.inputs)
    return found


def _joins_parameter(site: Site) -> bool:
    """Whether scores are joined with learned ones along the axis of the alternatives: a sink."""
    for value in ancestors(site.energies, carries):
        call = value.call
        if call is None or call.op not in {"aten.cat", "aten.concat", "aten.concatenate"} or not value.shape:
            continue
        axis = call.arg("dim", 0) % len(value.shape) - len(value.shape)
        learned = any(v.param and not v.data for v in call.inputs)
        if axis in site.axes and value.shape[axis] == site.count and learned and any(computed(v) for v in call.inputs):
            return True
    return False


def _maker_of_axis(site: Site, axes: Axes) -> Call | None:
    """Return the call through which the parameter that the alternatives are rows of enters the energies."""
    dims = axes.of(site.energies)
    if site.form is not None or not site.axes or not dims or max(-a for a in site.axes) > len(dims):
        return None
    names = {f.origin.name for axis in site.axes for f in dims[axis] if f.origin.kind in {"param", "buffer"}}
    if not names:
        return None
    for value in ancestors(site.energies, lambda call: not owners.owns(call)):
        call = value.call
        if call is not None and names & set(owners.tables(call)) and any(v.data for v in call.inputs):
            return call
    return None


def _leaves(value: Value) -> tuple[str, ...]:
    stack, found = [value], dict[str, None]()
    while stack:
        item = stack.pop()
        if item.leaf == "param":
            found[item.name] = None
        elif item.call is not None:
            stack.extend(item.call.inputs)
    return tuple(found)


def _kind(site: Site, axes: Axes, trace: Trace) -> tuple[AlternativeKind, bool]:
    energies = site.energies
    dims = axes.of(energies)
    if not energies.data:
        return ("keys", False) if _of_learned(energies) else ("prior", True)
    if not dims or max(-a for a in site.axes) > len(dims):
        return site.kind, False
    along = [dims[axis] for axis in site.axes]
    returned = {source(v).id for v in trace.outputs}
    if site.mechanism in {"softmax", "kernel"} and _are_keys(energies, along, axes):
        return "keys", False
    if site.mechanism == "truncation" and len(along) == 1 and _latents_of_batch(along[0]):
        site.count, site.kept, site.label = along[0][-1].size, None, "Batch top-k"
        return "latents", True
    if all(is_persistent(dim) for dim in along):
        if site.mechanism == "truncation":
            return ("experts" if site.kind == "experts" else "latents"), True
        if site.mechanism == "selection":
            return _selected_kind(site, trace), True
        if site.statistic == "log-partition" and source(site.emitted).id in returned:
            return ("classes" if _handed_out(energies, returned) and not _distance(site.owner) else "prototypes"), True
        if _handed_out(site.emitted, returned, along) and not _distance(site.owner):
            return "classes", True
        if _distance(site.owner) or _mixes_parameters(site.emitted):
            return "prototypes", True
        return ("experts" if _mixes_computed(site.emitted, axes) else "units"), True
    if site.mechanism != "truncation" and _is_batch(along, trace, axes) and not _from_product(energies):
        return "batch", False
    return ("keys" if _from_product(energies) else "positions"), False


def _latents_of_batch(dim: Dim) -> bool:
    """Whether a ranking runs over the latents of all samples together: rows of a weight, once per sample."""
    return len(dim) >= 2 and dim[-1].origin.persistent and not any(f.origin.persistent for f in dim[:-1])


def _selected_kind(site: Site, trace: Trace) -> AlternativeKind:
    returned = {source(v).id for v in trace.outputs}
    if site.chosen is not None:
        for user, operand in descendants(site.chosen, index_arithmetic):
            table = [v for v in user.inputs if v is not operand]
            looks_up = user.op in LOOKUP or user.op in INDEXERS or user.op in CONTRACTION or user.op == "aten.mul"
            held = [v for v in table if not v.data and v.floating]
            if looks_up and held:  # rows of a table go forward, looked up or by one-hot product
                return "classes" if _told_apart(site, held, returned) else "codes"
        if source(site.chosen).id in returned:
            return "classes"
    return "codes" if _distance(site.owner) else "units"


def _told_apart(site: Site, held: list[Value], returned: set[int]) -> bool:
    """Whether a winner is known by more than the row of another table that it looks up: a token that was decoded.

    Its scores or its index are handed out, or the input looks rows up in the same table. The nearest code is looked up
    where its score came from.
    """
    names = {name for value in held for name in _held_in(value)}
    near = {
        name
        for value in ancestors(site.energies, lambda call: not owners.owns(call))
        for operand in (value, *(value.call.inputs if value.call is not None else ()))
        if not operand.data
        for name in _held_in(operand)
    }
    if not names or names & near:
        return False
    chosen = site.chosen is not None and _handed_out(site.chosen, returned)
    return chosen or _handed_out(site.energies, returned) or any(_read_by_input(value) for value in held)


def _held_in(value: Value) -> set[object]:
    """Return the names of the parameters and buffers that a value is made of, without the input."""
    found: set[object] = set()
    for item in ancestors(value, lambda call: not call.out.data):
        if item.leaf is not None and not item.data:
            found.add(item.name or item.id)
    return found


def _read_by_input(table: Value) -> bool:
    return any(u.op in LOOKUP and any(v.data and not v.param for v in u.inputs) for u in table.users)


def _handed_out(value: Value, returned: set[int], along: list[Dim] | None = None) -> bool:
    """Whether a value is returned, alone or joined with others; ``along``: or mixtures of it over other axes are, whose
    entries are still those of its alternatives (a mixture of softmaxes)."""
    if source(value).id in returned:
        return True
    size = math.prod(f.size for dim in along for f in dim) if along is not None else 0

    def passes(call: Call) -> bool:
        if call.op in VIEW or call.op in PASS or call.op in JOIN:
            return True
        return along is not None and _mixes_over_others(call, value, size)

    return any(
        source(out).id in returned for call, _ in descendants(value, passes) if passes(call) for out in call.outputs
    )


def _mixes_over_others(call: Call, value: Value, size: int) -> bool:
    """Whether a call weighs, sums or takes the logarithm of distributions whole: alike for each of ``size`` entries."""
    if not call.outputs or any(not v.shape or v.shape[-1] != size for v in (call.out, value)):
        return False
    if call.op in REDUCTION:
        return call.op in {"aten.sum", "aten.mean"} and call.inputs[0].shape[-1:] == (size,)
    if call.op in CONTRACTION:
        return len(call.inputs) == 2 and sum(bool(v.shape) and v.shape[-1] == size for v in call.inputs) == 1
    wide = [v for v in call.inputs if v.shape and v.shape[-1] == size]
    return pointwise(call.op) and len(wide) == 1


def _distance(call: Call | None) -> bool:
    return call is not None and call.op in {"aten.cdist", "aten.sub", "aten.pairwise_distance"}


def _mixes_parameters(value: Value) -> bool:
    return any(
        user.op in CONTRACTION and any(v.param and not v.data for v in user.inputs if v is not value)
        and any(v is value for v in user.inputs[:1])
        for user in value.users
    )  # fmt: skip


def _averages(site: Site, trace: Trace) -> bool:
    """Whether the responsibilities are contracted along their own axis: a posterior mean goes forward."""
    uses = [u for u, _ in descendants(site.emitted, lambda c: c.op in VIEW or c.op in PASS)]
    real = [u for u in uses if not (u.op in VIEW or u.op in PASS) and trace.is_live(u)]
    return bool(real) and all(
        u.op in CONTRACTION or (u.op == "aten.mul" and any(n.op == "aten.sum" for n in u.out.users)) for u in real
    )


def _mixes_computed(value: Value, axes: Axes) -> bool:
    layer = [value]
    for _ in range(3):
        users = [user for item in layer for user in item.users]
        for user in users:
            others = [v for v in user.inputs if v not in layer and computed(v)]
            if (user.op in CONTRACTION or user.op == "aten.mul") and any(
                is_persistent(dim) for v in others for dim in axes.of(v)[:-1]
            ):
                return True
        layer = [out for user in users if user.op in VIEW or user.op in PASS for out in user.outputs]
    return False


def _is_batch(along: list[Dim], trace: Trace, axes: Axes) -> bool:
    """Whether alternatives run over an input's first axis and the model returns one result for each of its entries."""
    origins = {factor.origin for dim in along for factor in dim}
    if not origins or not all(o.kind == "input" and o.dim == 0 for o in origins) or origins & _time(trace, axes):
        return False
    kept = {factor.origin for v in trace.outputs for dim in axes.of(v)[:1] for factor in dim}
    return bool(origins & kept) or not trace.outputs


def _time(trace: Trace, axes: Axes) -> set[Origin]:
    """Return what attention has its keys along, and recurrence its steps: the first axis of a sequence-first input."""
    found: set[Origin] = set()
    for call in trace.calls:
        along: Dim = ()
        if call.op in SDPA and len(call.inputs[1].shape) >= 2:
            along = axes.of(call.inputs[1])[-2]
        elif call.op in RECURRENT and call.arg("batch_first") is False and len(call.inputs[0].shape) == 3:
            along = axes.of(call.inputs[0])[0]
        found |= {factor.origin for factor in along}
    return found


def _are_keys(energies: Value, along: list[Dim], axes: Axes) -> bool:
    """Whether alternatives run over a computed side of a product: over keys, whether or not the queries are learned."""
    product = nearest_product(energies)
    if product is None:
        return False
    origins = {factor.origin for dim in along for factor in dim}
    sides = [v for v in product.inputs if v.floating]
    over = [v for v in sides if origins & {f.origin for dim in axes.of(v) for f in dim}]
    return all(map(computed, sides)) or (bool(over) and all(map(computed, over)))


def product_of_computed(energies: Value) -> bool:
    """Whether energies are a product of two values that the model computed: queries and keys."""
    product = nearest_product(energies)
    return product is not None and sum(computed(v) or projected(v) for v in product.inputs) >= 2


def _from_product(energies: Value) -> bool:
    """Whether energies are products of two computed things: queries and keys."""
    queue, seen = [energies], {energies.id}
    for item in queue:
        call = item.call
        if call is None or len(seen) > 60:
            continue
        if call.op in CONTRACTION:
            if sum(computed(v) for v in call.inputs) >= 2 or not any(v.param and not v.data for v in call.inputs):
                return True
            continue
        if call.op in VIEW or call.op in PASS or call.op in JOIN or pointwise(call.op) or call.op in {"aten.sum"}:
            for parent in call.inputs:
                if computed(parent) and parent.id not in seen:
                    seen.add(parent.id)
                    queue.append(parent)
    return False


def projected(value: Value) -> bool:
    """Whether a value is parameters that a layer has mapped: learned queries."""
    return value.param and not value.data and any(
        v.call is not None and v.call.op in CONTRACTION for v in ancestors(value, lambda c: c.op not in CONTRACTION)
    )  # fmt: skip


def _of_learned(energies: Value) -> bool:
    """Whether energies are a product of two learned things that layers have mapped: latents that attend to each other."""
    product = next((v.call for v in ancestors(energies, carries) if v.call and v.call.op in CONTRACTION), None)
    return product is not None and sum(projected(v) for v in product.inputs) >= 2


def nearest_product(energies: Value) -> Call | None:
    """Return the nearest contraction of two computed values behind energies: queries with keys."""
    queue, seen = [energies], {energies.id}
    for item in queue:
        call = item.call
        if call is None:
            continue
        if call.op in CONTRACTION and sum(computed(v) or projected(v) for v in call.inputs) >= 2:
            return call
        if owners.owns(call):
            continue
        for parent in call.inputs:
            if computed(parent) and parent.id not in seen and len(seen) < 60:
                seen.add(parent.id)
                queue.append(parent)
    return None
