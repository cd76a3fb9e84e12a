"""Routers: a choice whose index selects an expert. One row takes in all that is made of the scores and the choice."""

from __future__ import annotations

import math

from emscan.classify import selection
from emscan.classify.flow import ancestors, carries, computed, mixes, onward, source
from emscan.classify.site import Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Value
from emscan.trace.operators import EXTREMUM, NORMALIZATION, RANKING, SOFTMAX

FOLDS = frozenset({"aten.sum", "aten.amax", "aten.max", "aten.gather", "aten.linalg_vector_norm"})


def score_path(call: Call) -> bool:
    """Whether a call is on the way from a router's scores to its choice."""
    return carries(call) or call.op in SOFTMAX or call.op in RANKING or call.op in FOLDS


def as_router(site: Site, axes: Axes) -> bool:
    """Turn a selection into a router if its index selects an expert; say whether it did."""
    choice = site.chosen if site.chosen is not None else site.winner
    if choice is None or _over_positions(site, axes):
        return False
    routed = routing(list(ancestors(site.energies, score_path)))
    if not selection.is_router(choice, axes, site.count, routed):
        return False
    site.mechanism, site.statistic, site.kind = "truncation", "top-k", "experts"
    if not site.label.startswith("Top-"):
        site.label = "Top-1"
    site.label += " router"
    return True


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
        whole = bool(inputs) and all(v.id in made for v in inputs)
        if not whole or mixes(call) or call.op in NORMALIZATION:
            return False
        made.update(out.id for out in call.outputs)
        return True

    return found | onward((v for v in above if computed(v)), accepts)


def take_in(site: Site, others: list[Site], above: list[Value], routed: set[Call]) -> list[Site]:
    """Join to a router every competition and gate of its own scores; return the sites that remain."""
    alone = [s for s in others if s is not site and s.attention is None and s.members and s.members <= routed]
    chosen = 1 + sum(s.kind == "experts" and s.op in EXTREMUM for s in alone)
    if site.op in EXTREMUM and chosen > 1:  # the best, then the best of the rest
        site.label = f"Top-{chosen} router"
    for other in alone:
        site.members |= other.members
        fits = other.energies.shape == site.energies.shape == other.emitted.shape
        if site.soft is None and other.mechanism in {"softmax", "kernel", "logistic"} and fits:
            site.soft, site.energies = other.emitted, other.energies
    site.members |= {c for c in routed if c.op in RANKING or c.op in EXTREMUM or c.op in SOFTMAX}
    _widen(site, above)
    return [s for s in others if s not in alone]


def _widen(site: Site, above: list[Value]) -> None:
    """A router that first chooses among groups of experts still chooses among all experts: the width of its scores."""
    roots = [v for v in above if computed(v) and v.floating and (v.call is None or not score_path(v.call)) and v.shape]
    if len(roots) != 1 or site.count is None or len(site.axes) != 1:
        return
    root = source(roots[0])
    if root.shape[-1] > site.count and root.shape[-1] % site.count == 0 and not _same_width(site, root):
        site.count, site.energies, site.axes, site.soft, site.chosen = root.shape[-1], root, (-1,), None, None


def _same_width(site: Site, root: Value) -> bool:
    """Whether the scores keep their size on the way: then it is no group that is chosen."""
    return math.prod(root.shape) == math.prod(site.energies.shape) and root.shape[-1] == site.energies.shape[-1]
