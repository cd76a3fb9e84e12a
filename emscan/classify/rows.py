"""Sites -> rows: one per layer, with its name, its alternatives, and every call of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from emscan.classify import owners
from emscan.classify.alternatives import nearest_product, place, product_of_computed
from emscan.classify.keys import product_key, projection, recursion, same_kind, spelling
from emscan.classify.site import Site
from emscan.report.document import Mechanism
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import (
    CONTRACTION,
    LOOKUP,
    NORMALIZATION,
    PASS,
    POOLING,
    RECURRENT,
    pointwise,
)


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
        place(site, axes, trace)
        name, composition = _title(site, names)
        key = product_key(site, axes)
        if key is None:
            same_call = (id(site.owner) if site.owner else name, site.mechanism, same_kind(site))
            seen = ordinals.setdefault(same_call, [])
            spelled = spelling(site, axes)
            if spelled not in seen:
                seen.append(spelled)
            alike = site.mechanism == "logistic" and site.owner is not None
            key = (site.owner_names or name, site.mechanism, same_kind(site), 0 if alike else seen.index(spelled))
        before = recursion(site, made)
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
    own = [s for s in sites if s.attention is None and (s.form is not None or not product_of_computed(s.energies))]
    owning = {id(site.owner) for site in own if site.owner is not None}
    taken = {id(call) for site in sites for call in site.members}
    found += plain(trace, names, owning, taken)
    return sorted(found, key=lambda row: row.order)


def _calls(row: Row) -> int:
    """Return how often the layer was called: the gates that one call feeds (LSTM by hand) count once."""
    labels = dict.fromkeys(site.label for site in row.sites)
    if row.mechanism == "logistic" and len(row.sites) > 1:
        if len(labels) > 1:
            row.composition = row.composition.replace(row.sites[0].label, "/".join(labels))
        return len({id(site.owner) if site.owner else id(site) for site in row.sites})
    return len(row.sites)


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
    product = nearest_product(energies)
    made = [projection(v) for v in product.inputs if v.floating] if product is not None else []
    return [names.of(own) for own in made if own]


def _module(site: Site) -> str | None:
    members = sorted(site.members, key=lambda call: call.id)
    last = members[-1].module if members else ""
    return last or None


def plain(trace: Trace, names: owners.Names, owning: set[int], taken: set[int]) -> list[Row]:
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
