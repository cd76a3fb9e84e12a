"""Routers: a choice whose index selects an expert. One row takes in all that is made of the scores and the choice."""

from __future__ import annotations

import math

from emscan.classify import choices, selection
from emscan.classify.flow import ancestors, carries, computed, descendants, mixes, onward, same, source
from emscan.classify.posterior import before_truncation
from emscan.classify.site import Posterior, Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Value
from emscan.trace.operators import EXTREMUM, NORMALIZATION, PASS, RANKING, SOFTMAX, VIEW

FOLDS = frozenset({"aten.sum", "aten.amax", "aten.max", "aten.gather", "aten.linalg_vector_norm"})

_IN_STEPS = "one layer chooses among groups, another one in them: the posterior over all experts is not measured"
_AT_MOST = frozenset({"aten.lt", "aten.le"})
_COMPARES = _AT_MOST | {"aten.gt", "aten.ge"}


def score_path(call: Call) -> bool:
    """Whether a call is on the way from a router's scores to its choice."""
    return carries(call) or call.op in SOFTMAX or call.op in RANKING or call.op in FOLDS


def as_router(site: Site, axes: Axes) -> bool:
    """Turn a selection into a router if its index selects an expert; say whether it did."""
    choice, inverted = _choice(site)
    if choice is None or _over_positions(site, axes):
        return False
    above = list(ancestors(site.energies, score_path))
    routed = routing(above)
    scores = {v.id for v in above} | {out.id for call in routed for out in call.outputs}
    if not selection.is_router(choice, axes, site.count, routed, scores):
        return False
    if choice is not site.chosen:
        site.chosen, site.winner, site.inverted = None, choice, inverted
    site.mechanism, site.statistic, site.kind = "truncation", "top-k", "experts"
    if not site.label.startswith("Top-"):
        site.label = "Top-1"
    site.label += " router"
    return True


def _choice(site: Site) -> tuple[Value | None, bool]:
    """Return the indices of a choice, or a mask where these are not used; and whether it is of what is left out."""
    if site.chosen is None or site.chosen.users:
        return (site.chosen if site.chosen is not None else site.winner), False
    ranked = site.chosen.call.out if site.chosen.call is not None else None
    for user, operand in descendants(ranked, lambda c: c.op in VIEW or c.op in PASS) if ranked is not None else ():
        others = [v for v in user.inputs if v is not operand]
        if user.op in _COMPARES and len(others) == 1 and same(source(others[0]), source(site.energies)):
            above = (user.op in _AT_MOST) == (user.inputs[0] is operand)  # the least that is kept, at most the scores
            return user.out, not above
    return site.chosen, False


def _over_positions(site: Site, axes: Axes) -> bool:
    """Whether the alternatives are entries of the input: tokens that are picked out are no experts."""
    dims = axes.of(site.energies)
    if len(site.axes) != 1 or -site.axes[0] > len(dims):
        return False
    return any(f.origin.kind == "input" or f.origin.position for f in dims[site.axes[0]])


def routing(above: list[Value]) -> set[Call]:
    """Return the calls that see nothing computed but a router's scores, what is made of them, and other such calls."""
    made = {v.id for v in above if computed(v)}
    found = {v.call for v in above if v.call is not None and score_path(v.call) and computed(v)}

    def accepts(call: Call) -> bool:
        inputs = [v for v in call.inputs if computed(v)]
        whole = bool(inputs) and all(v.id in made for v in inputs) and not _routes_input(call, inputs)
        if not whole or mixes(call) or call.op in NORMALIZATION:
            return False
        made.update(out.id for out in call.outputs)
        return True

    return found | onward((v for v in above if computed(v)), accepts)


def _routes_input(call: Call, scores: list[Value]) -> bool:
    """Whether a call brings scores or choices together with the model's input itself, not with a mask of that."""
    raw = [math.prod(v.shape) for v in call.inputs if v.data and not v.param and v.floating]
    return bool(raw) and max(raw) >= max(math.prod(v.shape) for v in scores)


def take_in(site: Site, others: list[Site], above: list[Value], routed: set[Call], axes: Axes) -> list[Site]:
    """Join to a router every competition and gate of its own scores; return the sites that remain."""
    alone = [s for s in others if s is not site and s.attention is None and s.members and s.members <= routed]
    alike = [s for s in alone if s.kind == "experts"]
    chosen = 1 + sum(s.op in EXTREMUM for s in alike)
    if site.op in EXTREMUM and chosen > 1:  # the best, then the best of the rest
        site.label = f"Top-{chosen} router"
    for other in alone:
        site.members |= other.members
        fits = other.energies.shape == site.energies.shape == other.emitted.shape
        if site.soft is None and other.mechanism in {"softmax", "kernel", "logistic"} and fits:
            site.soft, site.energies = other.emitted, other.energies
    site.members |= {c for c in routed if c.op in RANKING or c.op in EXTREMUM or c.op in SOFTMAX}
    scores = {v.id for v in above} | {out.id for call in routed for out in call.outputs}
    rankings = {c for c in routed | site.members if c.op in RANKING or c.op in EXTREMUM}
    indices = [out for call in rankings for out in call.outputs if not out.floating]
    if _widen(site, above, axes):
        site.choices = choices.among_groups(int(site.count or 0), indices, axes, routed, scores)
        _label(site)
    else:
        site.choices = choices.of_router(site, alone, axes, routed, scores)
    site.cuts = choices.capacity_cuts(site.choices)
    if _IN_STEPS in site.notes:  # a product over both layers, which no value need hold
        site.posterior = Posterior(site.energies, "untold", site.axes[0])
    else:
        site.posterior = before_truncation(site, site.choices, others, axes, routed) or _of_all(site, alone)
    return [s for s in others if s not in alone]


def _of_all(site: Site, alone: list[Site]) -> Posterior | None:
    """Return the normalized scores of all experts, where groups were chosen from them."""
    shape = site.energies.shape
    for other in alone:
        if (
            other.mechanism in {"softmax", "kernel", "logistic"}
            and other.emitted.shape == other.energies.shape == shape
        ):
            return Posterior(other.emitted, "shares", site.axes[0])
    return None


def _label(site: Site) -> None:
    """Name a router after the number of experts that it chooses, where groups come first."""
    if site.choices and site.count:
        competitions = math.prod(site.energies.shape) // site.count
        site.label = f"Top-{math.prod(site.choices[0].value.shape) // max(1, competitions)} router"


def _widen(site: Site, above: list[Value], axes: Axes) -> bool:
    """A router that first chooses among groups of experts still chooses among all: those that its scores are of."""
    roots = [v for v in above if computed(v) and v.floating and (v.call is None or not score_path(v.call)) and v.shape]
    grouped = any(v.call is not None and v.call.op in RANKING | EXTREMUM | FOLDS for v in above)
    if not roots or site.count is None or len(site.axes) != 1 or not grouped:
        return False
    origins = {f.origin.id for f in axes.of(site.energies)[site.axes[0]] if f.origin.persistent}
    apart = len(roots) > 1
    if apart:  # a layer for the groups and one for the experts in them: those that compete last
        roots = [v for v in roots if origins & {f.origin.id for dim in axes.of(v) for f in dim}]
    if len(roots) != 1:
        return False
    root = source(roots[0])
    along = [d - len(root.shape) for d, dim in enumerate(axes.of(root)) if origins & {f.origin.id for f in dim}]
    axis = along[0] if along else -1
    count = root.shape[axis]
    if count <= site.count or _same_width(site, root):
        return False
    site.count, site.energies, site.axes, site.soft, site.chosen = count, root, (axis,), None, None
    if apart:
        site.notes.append(_IN_STEPS)
    return True


def _same_width(site: Site, root: Value) -> bool:
    """Whether the scores keep their size on the way: then it is no group that is chosen."""
    return math.prod(root.shape) == math.prod(site.energies.shape) and root.shape[-1] == site.energies.shape[-1]
