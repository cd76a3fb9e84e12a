"""What names a row: two sites with one key are one layer that is called again."""

from __future__ import annotations

from emscan.classify import owners
from emscan.classify.alternatives import nearest_product
from emscan.classify.flow import ancestors, carries, computed
from emscan.classify.site import Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Value
from emscan.trace.operators import CONTRACTION, REDUCTION, VIEW


def spelling(site: Site, axes: Axes) -> object:
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


def product_key(site: Site, axes: Axes) -> tuple[object, ...] | None:
    """Return what names a competition between queries and keys: the parameters behind both and the rows of them.

    A loop over blocks of positions, or over iterations, is the same layer called again; other rows (other heads) are not.
    """
    if site.mechanism not in {"softmax", "kernel", "truncation"} or site.form is not None:
        return None
    product = site.attention if site.attention is not None else nearest_product(site.energies)
    if product is None:
        return None
    operands = list(product.inputs[:2]) if site.attention is not None else [v for v in product.inputs if v.floating]
    sides = []
    for operand in operands:
        names = projection(operand)
        if names is None:
            return None
        factors = [factor for dim in axes.of(operand) for factor in dim]
        rows = {(f.origin.name, f.origin.dim, f.start, f.step, f.size) for f in factors if f.origin.persistent}
        steps = {f.step for f in factors if not f.origin.persistent}  # landmarks are no block of the positions
        sides.append((names, tuple(sorted(rows)), tuple(sorted(steps))))
    if site.attention is not None:
        return site.mechanism, site.label, *sides
    over = {
        (f.origin.kind, f.origin.name.partition("#")[0]) for axis in site.axes for f in axes.of(site.energies)[axis]
    }
    return site.mechanism, site.label, _in_product(site, product), tuple(sorted(over)), *sides


def _in_product(site: Site, product: Call) -> tuple[int, ...]:
    """Return the axis (negative) of the product that the alternatives run over, behind transpositions of the scores."""
    if len(site.axes) != 1:
        return site.axes
    axis, value = site.axes[0], site.energies
    while value.call is not None and value.call is not product:
        call, rank = value.call, len(value.shape)
        order = list(range(-rank, 0))
        if call.op in {"aten.transpose", "aten.swapaxes"}:
            first, second = (call.arg(name) % rank - rank for name in ("dim0", "dim1"))
            order[first], order[second] = order[second], order[first]
        elif call.op in {"aten.mT", "aten.t", "aten.adjoint"} and rank > 1:
            order[-1], order[-2] = order[-2], order[-1]
        elif call.op == "aten.permute":
            order = [dim % rank - rank for dim in call.arg("dims")]
        axis = order[axis] if -axis <= rank else axis
        value = next((v for v in call.inputs if computed(v) and v.floating), call.inputs[0])
    return (axis,)


def projection(operand: Value) -> tuple[str, ...] | None:
    """Return the parameters of the layer behind queries or keys; of the last one where they start as parameters."""
    if computed(operand):
        owner = owners.owner_of(operand)
        return owners.parameters(owner) if owner is not None else None
    for value in ancestors(operand, lambda c: c.op not in CONTRACTION):
        if value.call is not None and value.call.op in CONTRACTION:
            return tuple(v.name for v in value.call.inputs if v.leaf == "param")
    return None


def recursion(site: Site, made: dict[int, tuple[Site, tuple[object, ...]]]) -> tuple[object, ...] | None:
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


def same_kind(site: Site) -> tuple[object, ...]:
    """What two competitions after one layer must share to be called the same."""
    if site.mechanism == "logistic":
        return (site.op in owners._LABELS,)
    return (site.label, site.count if site.persistent else None)
