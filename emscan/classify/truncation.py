"""Truncation: a normalized or ranked set with exact zeros - routers, top-k latents, sparsemax, normalized ReLU."""

from __future__ import annotations

from emscan.classify import gates, routers, selection
from emscan.classify.flow import SCATTERS, ancestors, carries, computed, descendants, mixes, onward, same, source
from emscan.classify.ratios import Ratio
from emscan.classify.regions import Regions
from emscan.classify.site import Site
from emscan.classify.softmax import hidden_by_scores
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import EXTREMUM, PASS, RANKING, SOFTMAX, VIEW, pointwise

_HINGES = frozenset(
    f"aten.{name}" for name in "relu clamp clamp_min clip maximum max threshold hardtanh where mul".split()
)


def ranked(trace: Trace, claimed: set[Call]) -> list[Site]:
    """Return a site for every top-k over computed scores that keeps fewer than all."""
    sites = []
    for call in trace.calls:
        if call in claimed or not (call.op in RANKING or call.op == "aten.kthvalue") or not trace.is_live(call):
            continue
        scores = call.inputs[0]
        if not (computed(scores) and scores.floating and scores.shape):
            continue
        rank = len(scores.shape)
        axis = (call.arg("dim", -1) if call.arg("dim", -1) is not None else -1) % rank - rank
        count = scores.shape[axis]
        winner = _above(call) if call.op == "aten.kthvalue" else None
        if call.op != "aten.kthvalue":
            kept = _keeps_of(call, axis)
        elif winner is not None and winner.call is not None:
            kept = count - int(call.arg("k")) + (winner.call.op == "aten.ge")
        else:
            continue
        if kept is None or not 0 < kept < count:
            continue
        chosen = next((out for out in call.outputs if not out.floating), None) if winner is None else None
        site = Site(
            "hard", "truncation", f"Top-{kept}", {call}, scores, call.out, "top-k", count, "latents", axes=(axis,),
            op=call.op, chosen=chosen, kept=kept, winner=winner,
        )  # fmt: skip
        if kept == 1:  # one of K wins
            site.mechanism, site.label, site.statistic = "selection", "Max", "mode"
        sites.append(site)
    return sites


def _above(call: Call) -> Value | None:
    """Return the mask of the scores that are above their k-th smallest, where that is what it is used for."""
    for user, _ in descendants(call.out, lambda c: c.op in VIEW or c.op in PASS):
        if user.op in {"aten.gt", "aten.ge"} and same(source(user.inputs[0]), source(call.inputs[0])):
            return user.out
    return None


def _keeps_of(call: Call, axis: int) -> int | None:
    """Return how many a ranking keeps: k of a top-k; the entries cut from its head, of a sort too."""
    sizes = [
        user.out.shape[axis]
        for output in call.outputs
        for user in output.users
        if user.op in {"aten.slice", "aten.narrow"}
        and len(user.out.shape) == len(output.shape)
        and user.arg("start", 0) in {0, None}
    ]
    sizes += [
        1
        for output in call.outputs
        for user in output.users
        if user.op == "aten.select"
        and user.arg("index") in {0, -1}
        and user.arg("dim", 0) % len(output.shape) == axis % len(output.shape)
    ]
    if call.op == "aten.topk":
        sizes = sizes if len(sizes) == sum(len(output.users) for output in call.outputs) else []
        return min([int(call.arg("k")), *sizes])
    return min(sizes, default=None)


def looked_up(trace: Trace, claimed: set[Call]) -> list[Site]:
    """Return a site for every lookup of a few computed scores by indices that the scores have no part in (hashing)."""
    sites = []
    for call in trace.calls:
        if call in claimed or call.op not in {"aten.gather", "aten.take_along_dim"} or not trace.is_live(call):
            continue
        scores, index = call.inputs[0], call.inputs[-1]
        axis = call.arg("dim", -1)
        if not (computed(scores) and scores.floating and scores.shape) or not isinstance(axis, int):
            continue
        axis = axis % len(scores.shape) - len(scores.shape)
        count, kept = scores.shape[axis], call.out.shape[axis]
        if computed(index) or not index.data or not 0 < kept < count:
            continue
        sites.append(
            Site(
                "hard", "truncation", f"Top-{kept}", {call}, scores, call.out, "top-k", count, "latents", axes=(axis,),
                op=call.op, chosen=index, notes=["the input itself chooses the experts, not their scores"],
            )
        )  # fmt: skip
    return sites


def sparse_projections(trace: Trace, claimed: set[Call]) -> list[Site]:
    """Return sites whose hinge leaves weights that sum to one: sparsemax, entmax and their kin (found by the numbers)."""
    sites = []
    for call in trace.calls:
        if call in claimed or call.op not in _HINGES or not call.outputs:
            continue
        for value in (call.out, *(u.out for u in call.out.users if pointwise(u.op) and u.outputs)):
            axis = _simplex_axis(value)
            if axis is None or not computed(value) or not value.floating or value.id not in trace.live:
                continue
            members = _threshold_search(value)
            if not any(c.op in RANKING or c.op in EXTREMUM or c.op == "aten.cumsum" for c in members):
                continue
            if any(c.op == "aten.one_hot" or c.op in SCATTERS for c in members):
                continue  # an index decides, no threshold: a router
            scores = next((c.inputs[0] for c in sorted(members, key=lambda c: c.id) if c.op in RANKING), value)
            sites.append(
                Site(
                    "hard",
                    "truncation",
                    "Sparsemax",
                    members,
                    scores,
                    value,
                    "vector",
                    value.shape[axis],
                    "units",
                    axes=(axis,),
                    op=call.op,
                )
            )
            break
    return sites


def _simplex_axis(value: Value) -> int | None:
    """Return the axis along which a value is nonnegative, sums to one and has exact zeros."""
    tensor = value.tensor
    if tensor is None or not tensor.is_floating_point() or tensor.numel() == 0 or float(tensor.min()) < 0:
        return None
    if not bool((tensor == 0).any()) or bool(((tensor == 0) | (tensor == 1)).all()):
        return None  # zeros and ones alone are a choice that was made elsewhere
    for axis in range(-1, -tensor.dim() - 1, -1):
        if tensor.shape[axis] >= 2 and bool(((tensor.float().sum(axis) - 1).abs() < 1e-3).all()):
            return axis
    return None


def _threshold_search(value: Value) -> set[Call]:
    """Return the calls between the scores and a sparse projection of them."""
    found = {v.call for v in ancestors(value, lambda c: not mixes(c)) if v.call is not None and computed(v)}
    return {call for call in found if not mixes(call) and call.op != "emscan.mutated"}


def from_ratio(ratio: Ratio, regions: Regions, inner: set[Call], energies: Value) -> Site | None:
    """Return the site of weights with exact zeros over their own sum (normalized ReLU); None if all keep a share."""
    region = regions.region(ratio.weights)
    try:
        found = gates.read(region)
    except gates.UnreadError:
        found = None
    cut = found is not None and found.mechanism == "threshold" and any(stuck == 0 for stuck in found.form.stuck)
    if not cut:
        return None
    return Site(
        "hard", "truncation", "Normalized ReLU", ratio.members | inner | set(region.calls), energies, ratio.call.out,
        "vector" if ratio.vector else "mean", ratio.count, "units", axes=ratio.axes, op=ratio.call.op,
    )  # fmt: skip


def cut_by_scores(site: Site) -> bool:
    """Whether a softmax is over what a selection by its own scores has left; turns it into a truncation row."""
    if site.attention is not None or not hidden_by_scores(site):
        return False
    site.verdict, site.mechanism, site.label = "hard", "truncation", "Masked softmax"
    return True


def absorb(site: Site, others: list[Site], axes: Axes) -> list[Site]:
    """Take into a truncation row what maps its scores to what it hands out; return the sites that remain."""
    above = list(ancestors(site.energies, routers.score_path))
    upstream: set[Call | None] = {v.call for v in above if v.call is not None}
    scores = {v.id for v in above}
    if site.kind == "experts":
        routing = routers.routing(above)
        upstream |= routing
        scores |= {out.id for call in routing for out in call.outputs}
        others = routers.take_in(site, others, above, routing, axes)
    downstream = _kept(site, scores)
    remaining = []
    for other in others:
        before = bool(other.members & upstream) and _maps_scores(other, upstream, site)
        if before and _over_others(other, site, axes):  # experts that pick tokens
            other.kind = "experts" if _picks_for_experts(site, above, axes) else other.kind
            before = False
        after = bool(other.members & downstream) and not other.members - downstream - site.members
        if other is site or other.attention is not None or not (before or after):
            remaining.append(other)
            continue
        site.members |= other.members
        if before and other.mechanism != "truncation" and other.energies.shape == site.energies.shape:
            site.soft, site.energies = other.emitted, other.energies
    return remaining


def _maps_scores(other: Site, upstream: set[Call | None], site: Site) -> bool:
    """Whether a site upstream belongs to the ranking: normalizers do; a maximum only if nothing else uses it."""
    if other.mechanism == "selection":
        users = {user for call in other.members for out in call.outputs for user in out.users}
        return bool(users) and users <= upstream | site.members | other.members
    return other.mechanism != "threshold"


def _over_others(other: Site, site: Site, axes: Axes) -> bool:
    """Whether a softmax upstream has other alternatives than those that are ranked."""
    if other.mechanism not in {"softmax", "kernel"} or site.kind == "experts":
        return False
    mine, theirs = (
        {f.origin.id for axis in s.axes if -axis <= len(axes.of(s.energies)) for f in axes.of(s.energies)[axis]}
        for s in (site, other)
    )
    return bool(mine and theirs) and not mine & theirs


def _picks_for_experts(site: Site, above: list[Value], axes: Axes) -> bool:
    """Whether the entries of the input that a ranking has picked then meet parameters."""
    if site.chosen is None:
        return False
    routed = routers.routing(above)
    scores = {v.id for v in above} | {out.id for call in routed for out in call.outputs}
    return selection.is_router(site.chosen, axes, site.count, routed, scores)


def _kept(site: Site, scores: set[int]) -> set[Call]:
    """Return the calls that see nothing computed but what the truncation kept and the scores themselves."""
    first = site.first
    starts = [out for call in site.members for out in call.outputs]
    kept = {out.id for out in starts}

    def accepts(call: Call) -> bool:
        inputs = [v for v in call.inputs if computed(v)]
        if call.id <= first or not any(v.id in kept for v in inputs) or not _keeps(call):
            return False
        whole = all(v.id in kept or v.id in scores for v in inputs)
        kept.update(out.id for out in call.outputs if whole)
        return whole

    return onward(starts, accepts)


def _keeps(call: Call) -> bool:
    return carries(call) or call.op in SOFTMAX or call.op in routers.FOLDS
