"""Trace -> rows with a verdict: what the run computed decides, never a module's name or class."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from emscan.classify import (
    gates,
    kernel,
    losses,
    means,
    objective,
    pairs,
    plans,
    ratios,
    routers,
    selection,
    softmax,
    truncation,
    whole,
)
from emscan.classify.coverage import account
from emscan.classify.declared import Declared
from emscan.classify.flow import ancestors, computed, descendants, source
from emscan.classify.gradient import Reach
from emscan.classify.owners import bias_of, owner_of
from emscan.classify.regions import Regions
from emscan.classify.rows import Row, assemble
from emscan.classify.site import Site
from emscan.report.document import Coverage
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import CREATES, PASS, RANKING, RECURRENT, REDUCTION, SOFTMAX, pointwise
from emscan.trace.origins import reduced_axes

__all__ = ["Classification", "Row", "Site", "classify"]


@dataclass
class Classification:
    """Everything that one traced run says about structure."""

    trace: Trace
    axes: Axes
    regions: Regions
    rows: list[Row]
    coverage: Coverage
    objective: objective.Objective
    notes: list[str] = field(default_factory=list)


def classify(
    trace: Trace,
    parameter_names: list[str],
    *,
    objective_name: str = "auto",
    targets: Tensor | None = None,
    all_targets: Tensor | None = None,
    says: Declared | None = None,
) -> Classification:
    """Find every competition and gate of a traced run; ``says``: what a saved configuration names as the loss.

    Raises UsageError for an objective that does not fit.
    """
    axes, regions = Axes(trace), Regions(trace)
    sites = find_sites(trace, axes, regions)
    goal = objective.resolve(objective_name, trace, targets, sites, all_targets, says)
    sites += goal.added
    rows = assemble(trace, axes, sites, parameter_names)
    _note_logits(rows, trace, goal)
    return Classification(trace, axes, regions, rows, account(trace, sites, regions.unread), goal)


def find_sites(trace: Trace, axes: Axes, regions: Regions) -> list[Site]:
    """Return all sites of a trace, larger structures first: each claims the operators that belong to it."""
    divisions = ratios.find(trace)
    reach = Reach(trace)
    sites = softmax.find(trace, divisions, reach)
    sites += _other_ratios(divisions, sites, regions, {v.id for v in trace.outputs if v.floating})
    sites = whole.name_routers(sites, trace, axes, regions)
    _claim_twins(sites, trace)
    sites += pairs.find(trace, regions, {call for site in sites for call in site.members})
    sites += plans.find(trace, {call for site in sites for call in site.members})
    sites += means.find(trace, {call for site in sites for call in site.members})
    claimed = {call for site in sites for call in site.members}
    ranked = truncation.ranked(trace, claimed)
    claimed |= {call for site in ranked for call in site.members}
    sparse = truncation.sparse_projections(trace, claimed)
    claimed |= {call for site in sparse for call in site.members}
    chosen = selection.find(trace, regions, claimed)
    for site in (*ranked, *chosen):
        routers.as_router(site, axes)
    ranked += [site for site in truncation.looked_up(trace, claimed) if routers.as_router(site, axes)]
    claimed |= {call for site in chosen for call in site.members}
    found = [
        *losses.in_model(trace, axes),
        *sites,
        *ranked,
        *sparse,
        *chosen,
        *gates.find(trace, regions, claimed),
        *_recurrent(trace),
    ]
    for site in found:
        if site.mechanism == "softmax":
            truncation.cut_by_scores(site)
    found = _absorb(found, axes)
    losses.name_losses(trace, found, axes)
    for site in found:
        reach.follow(site)
    return [site for site in found if _live(site, trace)]


def _claim_twins(sites: list[Site], trace: Trace) -> None:
    """A model may compute the same weights twice, once for the numerator and once for the sum."""
    twins: dict[int, list[Call]] = {}
    for call in trace.calls:
        if call.outputs:
            twins.setdefault(call.out.flow, []).append(call)
    for site in sites:
        site.members |= {twin for call in site.members if call.outputs for twin in twins[call.out.flow]}


def _other_ratios(divisions: list[ratios.Ratio], sites: list[Site], regions: Regions, returned: set[int]) -> list[Site]:
    """Ratios that are not exponentials: a second normalization of a site, a hard cut, or a kernel."""
    taken = {call for site in sites for call in site.members}
    found: list[Site] = []
    for ratio in divisions:
        if ratio.call in taken:
            continue
        again = next((s for s in (*sites, *found) if _renormalizes(ratio, s)), None)
        if again is not None:
            if ratio.axes != again.axes and again.op in SOFTMAX:
                again.members |= ratio.members
                continue  # weights of a mean over another axis: the softmax keeps its own alternatives
            past = _goes_past(again.emitted, ratio.call, returned) or _meets_others(ratio.weights, again)
            if past or any(v.call is not None and v.call.op in RANKING for v in _between(ratio.weights, again.emitted)):
                again.members |= ratio.members  # a target made of the posterior, or its ranks: it keeps its own numbers
                continue
            again.members |= ratio.members
            again.emitted = ratio.emitted
            again.axes, again.count = ratio.axes, ratio.count + ratio.sink
            again.weights, again.weights_axes, again.denominator = ratio.weights, ratio.axes, ratio.denominator
            continue
        energies, inner = kernel.scores_of(ratio.weights, regions)
        site = truncation.from_ratio(ratio, regions, inner, energies) or kernel.from_ratio(ratio, regions)
        if site is not None:
            found.append(site)
    return found


def _renormalizes(ratio: ratios.Ratio, site: Site) -> bool:
    """Whether a ratio normalizes again what a site emitted: a mask, a sharpening, the other axis of Sinkhorn."""
    if site.statistic != "vector":
        return False
    value: Value | None = ratio.weights
    for _ in range(12):
        if value is None or value is site.emitted:
            break
        call = value.call
        moved = call is not None and call.op in RANKING | {"aten.scatter"}  # all of them, in another order
        given = [v for v in call.inputs if computed(v) and v.floating] if call is not None else []
        whole = moved and len(given) == 1 and given[0].shape == ratio.weights.shape
        if call is None or not (pointwise(call.op) or call.op in PASS or whole):
            return False
        value = given[0] if given else None
    return value is site.emitted


def _between(value: Value, end: Value) -> list[Value]:
    """Return ``value`` and what it was made from, no further than ``end``."""
    return list(ancestors(value, lambda call: end not in call.outputs))


def _goes_past(value: Value, end: Call, returned: set[int]) -> bool:
    """Whether a value is returned, or leads to something that is, by another way than through ``end``."""
    stack, seen = [value], {value.id}
    while stack:
        item = stack.pop()
        if item.id in returned:
            return True
        for user in item.users:
            for out in user.outputs if user is not end else ():
                if out.floating and out.id not in seen:
                    seen.add(out.id)
                    stack.append(out)
    return False


def _meets_others(weights: Value, site: Site) -> bool:
    """Whether weights are made of what a site emitted and of sums of it over other competitions, as a batch's are."""
    for value in ancestors(weights, lambda call: call not in site.members):
        call = value.call
        if call is None or call in site.members or call.op not in REDUCTION or not computed(value):
            continue
        made = source(call.inputs[0])
        rank = len(call.inputs[0].shape)
        over = {axis - rank for axis in reduced_axes(call, rank)}
        if made is source(site.emitted) and not over & set(site.axes):
            return True
    return False


def _absorb(sites: list[Site], axes: Axes) -> list[Site]:
    cut = [s for s in sites if s.mechanism == "truncation"]
    for site in sorted(
        cut, key=lambda s: (s.kind != "experts", -(s.count or 0))
    ):  # routers take in the rankings of their scores
        if site in sites:
            sites = truncation.absorb(site, sites, axes)
    for site in [s for s in sites if s.mechanism == "selection" and s.kind != "window"]:
        sites = _absorb_posterior(site, sites)
    return sites


def _absorb_posterior(site: Site, sites: list[Site]) -> list[Site]:
    """A softmax whose output only serves to pick the winner belongs to the selection."""
    emitted = source(site.energies)
    for other in sites:
        if other.mechanism in {"softmax", "kernel", "logistic"} and other.emitted is emitted:
            uses = [
                u for u, _ in descendants(emitted, lambda c: c.op in PASS) if u.op not in PASS and u.op not in CREATES
            ]
            if all(u in site.members or _cancels(u, emitted) for u in uses):
                site.members |= other.members
                site.energies, site.soft = other.energies, other.emitted
                if any(u not in site.members for u in uses):
                    site.flags.append("straight-through")
                    site.notes.append("straight-through: forward hands out the winner, backward the softmax")
                return [s for s in sites if s is not other]
    return sites


def _cancels(user: Call, value: Value) -> bool:
    """Whether ``user`` is part of h - detach(y) + y, which is h in numbers and y in gradient."""
    if user.op not in {"aten.add", "aten.sub"} or len(user.inputs) < 2:
        return False
    return any(_difference(end, value) for end in (user, *user.out.users) if end.op in {"aten.add", "aten.sub"})


def _difference(call: Call, value: Value) -> bool:
    """Whether a sum holds ``value`` once as it is and once detached with the other sign."""
    terms: list[tuple[Value, int]] = []
    stack = [(v, -1 if call.op == "aten.sub" and i == 1 else 1) for i, v in enumerate(call.inputs[:2])]
    while stack:
        term, sign = stack.pop()
        base = source(term)
        made = base.call
        if made is not None and made.op in {"aten.sub", "aten.add"} and len(made.inputs) == 2 and base is not value:
            stack += [(v, -sign if made.op == "aten.sub" and i == 1 else sign) for i, v in enumerate(made.inputs)]
        else:
            terms.append((base, sign))
    signs = [sign for base, sign in terms if base is value]
    return sum(signs) == 0 and len(signs) >= 2


def _recurrent(trace: Trace) -> list[Site]:
    sites = []
    for call in trace.calls:
        kind = RECURRENT.get(call.op)
        if kind is None or not any(v.param for v in call.inputs):
            continue
        form = gates.recurrent_form(kind)
        site = Site(
            "em", "logistic", form.label, {call}, call.inputs[0], call.out, "gate", 2, "on-off", form=form, op=call.op
        )
        site.owner = call
        if call.op != "aten.lstm_cell" and "batch_sizes" in {a.name for a in call.func._schema.arguments}:
            site.notes.append("packed sequences: the gates are not measured")
        if kind == "relu":
            site.verdict, site.mechanism, site.leaky = "hard", "threshold", False
        sites.append(site)
    return sites


def _live(site: Site, trace: Trace) -> bool:
    return any(trace.is_live(call) or selection.read_by_python(call) for call in site.members)


def _note_logits(rows: list[Row], trace: Trace, goal: objective.Objective) -> None:
    if goal.name != "none":
        return
    for output in trace.outputs[:1]:
        made, owner = source(output).call, owner_of(output)
        if made is not None and owner is not None and bias_of(owner) is made:
            made = owner
        for row in rows:
            if (
                row.order == (made.id if made else -1)
                and row.mechanism == "affine"
                and output.shape
                and output.shape[-1] > 1
            ):
                row.note = "EM if trained with cross-entropy"
