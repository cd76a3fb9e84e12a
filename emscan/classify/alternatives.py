"""What the alternatives of a site are, and which layer computes their energies."""

from __future__ import annotations

from emscan.classify import owners
from emscan.classify.flow import INDEXERS, ancestors, carries, computed, descendants, source
from emscan.classify.selection import index_arithmetic
from emscan.classify.site import Site
from emscan.classify.softmax import SEGMENTS
from emscan.report.document import AlternativeKind
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import CONTRACTION, JOIN, LOOKUP, PASS, VIEW, pointwise
from emscan.trace.origins import Dim, is_persistent


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
        or site.op in SEGMENTS
        or site.segments is not None
    ):
        if site.segments is not None:
            site.kind = "positions"
        site.persistent = site.kind in {"experts", "classes"}
        return
    site.kind, site.persistent = _kind(site, axes, trace)
    if site.verdict == "em" and _joins_parameter(site):
        site.notes.append("one alternative is a sink of learned energy")
    if site.statistic == "vector" and site.verdict == "em" and _averages(site, trace):
        site.statistic = "mean"


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
        return "prior", True
    if not dims or max(-a for a in site.axes) > len(dims):
        return site.kind, False
    along = [dims[axis] for axis in site.axes]
    returned = {source(v).id for v in trace.outputs}
    if site.mechanism in {"softmax", "kernel"} and _are_keys(energies, along, axes):
        return "keys", False
    if all(is_persistent(dim) for dim in along):
        if site.mechanism == "truncation":
            return ("experts" if site.kind == "experts" else "latents"), True
        if site.mechanism == "selection":
            return _selected_kind(site, returned), True
        if source(site.emitted).id in returned and not _distance(site.owner):
            return "classes", True
        if _distance(site.owner) or _mixes_parameters(site.emitted):
            return "prototypes", True
        return ("experts" if _mixes_computed(site.emitted, axes) else "units"), True
    if _is_batch(along, trace, axes) and not _from_product(energies):
        return "batch", False
    return ("keys" if _from_product(energies) else "positions"), False


def _selected_kind(site: Site, returned: set[int]) -> AlternativeKind:
    if site.chosen is not None:
        for user, operand in descendants(site.chosen, index_arithmetic):
            table = [v for v in user.inputs if v is not operand]
            looks_up = user.op in LOOKUP or user.op in INDEXERS or user.op in CONTRACTION
            if looks_up and any(not v.data and v.floating for v in table):
                return "codes"  # rows of a table go forward, looked up or by one-hot product
        if source(site.chosen).id in returned:
            return "classes"
    return "codes" if _distance(site.owner) else "units"


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
    if not origins or not all(o.kind == "input" and o.dim == 0 for o in origins):
        return False
    kept = {factor.origin for v in trace.outputs for dim in axes.of(v)[:1] for factor in dim}
    return bool(origins & kept) or not trace.outputs


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
