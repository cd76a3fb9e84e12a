"""Sites -> rows: one per layer, with its name, its alternatives, and every call of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from emscan.classify import owners
from emscan.classify.flow import INDEXERS, ancestors, carries, computed, descendants, source
from emscan.classify.selection import index_arithmetic
from emscan.classify.site import Site
from emscan.classify.softmax import SEGMENTS
from emscan.report.document import AlternativeKind, Mechanism
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import (
    CONTRACTION,
    JOIN,
    LOOKUP,
    NORMALIZATION,
    PASS,
    POOLING,
    RECURRENT,
    REDUCTION,
    VIEW,
    pointwise,
)
from emscan.trace.origins import Dim, is_persistent


@dataclass(eq=False)
class Row:
    """One row of the report before measurement: ``sites`` holds one site per call of the layer."""

    name: str
    module: str | None
    composition: str
    mechanism: Mechanism
    key: object = None  # the same in every trace of one model
    sites: list[Site] = field(default_factory=list)
    calls: int = 1
    order: int = 0
    note: str | None = None

    @property
    def site(self) -> Site | None:
        """The site that stands for the row."""
        return self.sites[0] if self.sites else None


def assemble(trace: Trace, axes: Axes, sites: list[Site], parameter_names: list[str]) -> list[Row]:
    """Return all rows in the order of the run, those without competition included."""
    names = owners.Names(trace, parameter_names)
    rows: dict[tuple[object, ...], Row] = {}
    ordinals: dict[tuple[object, ...], list[object]] = {}  # spellings of what one call feeds, in order
    made: dict[int, tuple[Site, tuple[object, ...]]] = {}
    for site in sorted(sites, key=lambda s: s.first if s.members else math.inf):
        _place(site, axes, trace)
        name, composition = _title(site, names)
        key = _product_key(site, axes)
        if key is None:
            same_call = (id(site.owner) if site.owner else name, site.mechanism, _same_kind(site))
            seen = ordinals.setdefault(same_call, [])
            spelled = _spelling(site, axes)
            if spelled not in seen:
                seen.append(spelled)
            alike = site.mechanism == "logistic" and site.owner is not None
            key = (site.owner_names or name, site.mechanism, _same_kind(site), 0 if alike else seen.index(spelled))
        before = _recursion(site, made)
        key = before if before is not None else key
        made[id(site)] = (site, key)
        if key in rows:
            rows[key].sites.append(site)
            continue
        module = _module(site)
        order = site.first if site.members else len(trace.calls)
        rows[key] = Row(name, module, composition, site.mechanism, key, [site], order=order)
    found = list(rows.values())
    for row in found:
        row.calls = _calls(row)
    # queries and keys keep their own rows, however their product is written
    own = [s for s in sites if s.attention is None and (s.form is not None or not _product_of_computed(s.energies))]
    owning = {id(site.owner) for site in own if site.owner is not None}
    taken = {id(call) for site in sites for call in site.members}
    found += _plain(trace, names, owning, taken)
    return sorted(found, key=lambda row: row.order)


def _spelling(site: Site, axes: Axes) -> object:
    """Return what two competitions over entries of one call's output share if they are one layer in a loop: the same
    arithmetic on the same rows of the weights. Only the places that they are taken from differ."""
    factors = [factor for dim in axes.of(site.energies) for factor in dim if factor.origin.persistent]
    rows = frozenset((f.origin.name, f.origin.dim, f.start, f.step, f.size) for f in factors)
    taken = False
    done: set[object] = set()
    for value in ancestors(site.energies, lambda call: call is not site.owner and carries(call)):
        call = value.call
        if call is None or call is site.owner:
            continue
        taken = taken or call.op in {
            "aten.select",
            "aten.slice",
            "aten.unbind",
            "aten.split",
            "aten.chunk",
            "aten.index",
        }
        if call.op not in VIEW:
            done.add((call.op, *(a for a in call.args if isinstance(a, int | float))))
    return (site.axes, rows, frozenset(done)) if taken else id(site)


def _product_key(site: Site, axes: Axes) -> tuple[object, ...] | None:
    """Return what names a competition between queries and keys: the parameters behind both and the rows of them.

    A loop over blocks of positions, or over iterations, is the same layer called again; other rows (other heads) are not.
    """
    if site.mechanism not in {"softmax", "kernel", "truncation"} or site.form is not None:
        return None
    product = site.attention if site.attention is not None else _product(site.energies)
    if product is None:
        return None
    operands = list(product.inputs[:2]) if site.attention is not None else [v for v in product.inputs if v.floating]
    sides = []
    for operand in operands:
        names = _projection(operand)
        if names is None:
            return None
        factors = [factor for dim in axes.of(operand) for factor in dim]
        rows = {(f.origin.name, f.origin.dim, f.start, f.step, f.size) for f in factors if f.origin.persistent}
        steps = {f.step for f in factors if not f.origin.persistent}  # landmarks are no block of the positions
        sides.append((names, tuple(sorted(rows)), tuple(sorted(steps))))
    if site.attention is not None:
        return site.mechanism, _same_kind(site), *sides
    over = {
        (f.origin.kind, f.origin.name.partition("#")[0]) for axis in site.axes for f in axes.of(site.energies)[axis]
    }
    return site.mechanism, _same_kind(site), site.axes, tuple(sorted(over)), *sides


def _projection(operand: Value) -> tuple[str, ...] | None:
    """Return the parameters of the layer behind queries or keys; of the last one where they start as parameters."""
    if computed(operand):
        owner = owners.owner_of(operand)
        return owners.parameters(owner) if owner is not None else None
    for value in ancestors(operand, lambda c: c.op not in CONTRACTION):
        if value.call is not None and value.call.op in CONTRACTION:
            return tuple(v.name for v in value.call.inputs if v.leaf == "param")
    return None


def _recursion(site: Site, made: dict[int, tuple[Site, tuple[object, ...]]]) -> tuple[object, ...] | None:
    """Return the row of an earlier step of a recursion: energies made from what the same competition handed out,
    with nothing but arithmetic in between (forward algorithms, soft dynamic programming)."""
    if site.mechanism not in {"softmax", "kernel", "selection"} or site.attention is not None or not site.members:
        return None
    kind = site.label, site.mechanism, site.count
    emitted = {
        s.emitted.id: key
        for s, key in made.values()
        if (s.label, s.mechanism, s.count) == kind and s.members != site.members
    }
    if not emitted:
        return None
    return next((emitted[v.id] for v in ancestors(site.energies, _arithmetic) if v.id in emitted), None)


def _arithmetic(call: Call) -> bool:
    """Whether a call has no parameters of its own to compute new energies with."""
    if call.op in CONTRACTION:
        return not any(v.param and not v.data and v.floating for v in call.inputs)
    return carries(call) or call.op in REDUCTION


def _calls(row: Row) -> int:
    """Return how often the layer was called: the gates that one call feeds (LSTM by hand) count once."""
    labels = dict.fromkeys(site.label for site in row.sites)
    if row.mechanism == "logistic" and len(row.sites) > 1:
        if len(labels) > 1:
            row.composition = row.composition.replace(row.sites[0].label, "/".join(labels))
        return len({id(site.owner) if site.owner else id(site) for site in row.sites})
    return len(row.sites)


def _same_kind(site: Site) -> tuple[object, ...]:
    """What two competitions after one layer must share to be called the same."""
    if site.mechanism == "logistic":
        return (site.op in owners._LABELS,)
    return (site.label, site.count if site.persistent else None)


def _place(site: Site, axes: Axes, trace: Trace) -> None:
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
    if site.mechanism in {"softmax", "kernel"} and _product_of_computed(energies):
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
            if user.op in LOOKUP or user.op in INDEXERS or user.op in CONTRACTION:
                if any(not v.data and v.floating for v in table):
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


def _product_of_computed(energies: Value) -> bool:
    product = _product(energies)
    return product is not None and sum(computed(v) or _projected(v) for v in product.inputs) >= 2


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


def _title(site: Site, names: owners.Names) -> tuple[str, str]:
    if site.attention is not None:
        return _attention_name(site, names), "Attention"
    if site.owner is None:
        name = names.of(site.owner_names) or next((c.module for c in sorted(site.members, key=lambda c: c.id)), "")
        return name or site.label.lower(), ("Parameter + " if site.owner_names else "") + site.label
    name = names.of(site.owner_names)
    if site.kind == "keys":
        name = names.common(_operand_names(site.energies, names)) or name
        return name, f"Attention ({site.label})" if site.label != "Softmax" else "Attention"
    if site.op in RECURRENT:
        return name, owners.label(site.owner)
    between = [] if site.kind == "window" else owners.norms_between(site.energies, site.owner)
    return name, " + ".join([owners.label(site.owner), *dict.fromkeys(between), site.label])


def _attention_name(site: Site, names: owners.Names) -> str:
    assert site.attention is not None
    found = []
    for value in site.attention.inputs[:2]:
        owner = owners.owner_of(value)
        if owner is not None:
            found.append(names.of(owners.parameters(owner)))
    return names.common(found) or site.attention.module or "attention"


def _operand_names(energies: Value, names: owners.Names) -> list[str]:
    product = _product(energies)
    made = [owners.owner_of(v) for v in product.inputs] if product is not None else []
    return [names.of(owners.parameters(m)) for m in made if m is not None]


def _projected(value: Value) -> bool:
    """Whether a value is parameters that a layer has mapped: learned queries."""
    return value.param and not value.data and value.call is not None and value.call.op not in PASS | VIEW and any(
        v.call is not None and v.call.op in CONTRACTION for v in ancestors(value, lambda c: c.op not in CONTRACTION)
    )  # fmt: skip


def _product(energies: Value) -> Call | None:
    """Return the nearest contraction of two computed values behind energies: queries with keys."""
    queue, seen = [energies], {energies.id}
    for item in queue:
        call = item.call
        if call is None:
            continue
        if call.op in CONTRACTION and sum(computed(v) or _projected(v) for v in call.inputs) >= 2:
            return call
        if owners.owns(call):
            continue
        for parent in call.inputs:
            if computed(parent) and parent.id not in seen and len(seen) < 60:
                seen.add(parent.id)
                queue.append(parent)
    return None


def _module(site: Site) -> str | None:
    members = sorted(site.members, key=lambda call: call.id)
    last = members[-1].module if members else ""
    return last or None


def _plain(trace: Trace, names: owners.Names, owning: set[int], taken: set[int]) -> list[Row]:
    """Return the rows of layers in which no alternatives compete."""
    rows: dict[tuple[object, ...], Row] = {}
    biases = {id(bias) for call in trace.calls if (bias := owners.bias_of(call)) is not None}
    for call in trace.calls:
        mechanism = _mechanism(call)
        if (
            mechanism is None
            or id(call) in biases
            or id(call) in owning
            or (mechanism == "elementwise" and id(call) in taken)
        ):
            continue
        used = owners.parameters(call)
        if mechanism == "pooling":
            pooled = owners.owner_of(call.inputs[0])
            used = owners.parameters(pooled) if pooled is not None else used
        name = names.of(used) or call.module or call.op.rpartition(".")[2]
        key = (used or name, mechanism, call.op)
        if key in rows:
            rows[key].calls += 1
            continue
        rows[key] = Row(name, call.module or None, _plain_label(call), mechanism, key, order=call.id)
    return list(rows.values())


def _plain_label(call: Call) -> str:
    known = owners.label(call)
    if call.op in POOLING:
        return "".join(part.capitalize() for part in call.op.removeprefix("aten.").split("_"))
    return known


def _mechanism(call: Call) -> Mechanism | None:
    if call.op in POOLING and any(v.param for v in call.inputs):
        return "pooling"
    if not any(v.param and not v.data for v in call.inputs) or not call.outputs:
        return None
    meets_data = any(v.data for v in call.inputs)
    if call.op in NORMALIZATION and meets_data:
        return "normalization"
    if call.op in LOOKUP and meets_data:
        return "embedding"
    if call.op in CONTRACTION and meets_data:
        return "affine"
    named = any(v.leaf == "param" for v in call.inputs)
    return "elementwise" if pointwise(call.op) and meets_data and named and call.op not in PASS else None
