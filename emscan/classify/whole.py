"""Routers that keep every expert: all of them compete, whatever order a ranking puts them in.

Ranking all K of K alternatives changes their order and nothing else, so the competition is softmax's or a kernel's, and
its components are the experts, not the ranks.
"""

from __future__ import annotations

from emscan.classify import kernel, routers, selection
from emscan.classify.flow import ancestors, same, source
from emscan.classify.regions import Regions
from emscan.classify.site import Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import RANKING


def name_routers(sites: list[Site], trace: Trace, axes: Axes, regions: Regions) -> list[Site]:
    """Find which competitions are over experts, in order or ranked; return the sites that remain, one per router."""
    for site in sites:
        if site.mechanism not in {"softmax", "kernel"} or site.attention is not None or len(site.axes) != 1:
            continue
        above = list(ancestors(site.energies, routers.score_path))
        routed = routers.routing(above)
        rankings = [c for c in sorted(routed, key=lambda c: c.id) if ranks_all(c, site.axes[0], site.count)]
        scores = {v.id for v in above} | {out.id for call in routed for out in call.outputs}
        chosen = [out for call in rankings for out in call.outputs if not out.floating]
        if not any(selection.is_router(index, axes, site.count, routed, scores) for index in chosen):
            continue
        site.kind = "experts"
        ranking = _sorted_by(site.energies)
        if ranking is not None and ranking in rankings:
            site.order = ranking.outputs[1]
            site.members |= {ranking} | (kernel.scores_of(ranking.inputs[0], regions)[1] if _is_kernel(site) else set())
    return _joined(sites, trace)


def ranks_all(call: Call, axis: int, count: int | None) -> bool:
    """Whether a call ranks all ``count`` alternatives along an axis (negative) and leaves out none."""
    if call.op not in RANKING or not call.inputs or call.out.shape != call.inputs[0].shape or not call.out.shape:
        return False
    rank, dim = len(call.out.shape), call.arg("dim", -1)
    return isinstance(dim, int) and dim % rank - rank == axis and call.out.shape[axis] == count


def _is_kernel(site: Site) -> bool:
    return site.mechanism == "kernel"


def _sorted_by(energies: Value) -> Call | None:
    """Return the ranking that has put energies into their order."""
    call = source(energies).call
    return call if call is not None and call.op in {"aten.topk", "aten.sort"} else None


def _joined(sites: list[Site], trace: Trace) -> list[Site]:
    """Join what normalizes the scores in their own order (for a balancing loss, say) and once more ranked."""
    gone: set[int] = set()
    for site in sites:
        ranking = site.order.call if site.order is not None else None
        if ranking is None:
            continue
        for twin in sites:
            starts = [v for v in (twin.energies, twin.weights) if v is not None]
            if twin.order is not None or twin.mechanism != site.mechanism or twin.kind != "experts":
                continue
            if any(same(source(start), source(ranking.inputs[0])) for start in starts):
                keep, drop = (twin, site) if twin.emitted.id in trace.live else (site, twin)
                keep.members |= drop.members
                gone.add(id(drop))
    return [site for site in sites if id(site) not in gone]
