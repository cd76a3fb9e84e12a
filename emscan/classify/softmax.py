"""Softmax: exponentiate and normalize over K alternatives, in every spelling."""

from __future__ import annotations

import math

from emscan.classify.flow import (
    CLAMPS,
    DIVISIONS,
    INDEXERS,
    MASKS,
    PRODUCTS,
    RESHAPES,
    SCATTERS,
    ancestors,
    carries,
    computed,
    descendants,
    mixes,
    same,
    source,
)
from emscan.classify.gradient import Reach
from emscan.classify.ratios import Ratio, total
from emscan.classify.site import Site
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import CREATES, EXTREMUM, LOG_PARTITION, PASS, SDPA, SOFTMAX
from emscan.trace.origins import reduced_axes

EXPONENTIALS = frozenset(f"aten.{name}" for name in "exp exp2 special_exp2".split())
SEGMENTS = frozenset({"aten.scatter_reduce", "aten.index_reduce"})
_LOGS = frozenset(f"aten.{name}" for name in "log log2 log10 log1p".split())


def exponent(weights: Value) -> tuple[Value, set[Call]] | None:
    """Return the scores that ``weights`` is the exponential of, through factors, masks and guards."""
    members: set[Call] = set()
    queue = [weights]
    seen = {weights.id}
    for value in queue:
        call = value.call
        if call is None:
            continue
        if call.op in EXPONENTIALS or _power_of_constant(call):
            members.add(call)
            return _scores(call), members
        passes = call.op in PASS or call.op in RESHAPES or call.op in CLAMPS or call.op in MASKS
        if call.op in PRODUCTS and len(call.inputs) == 2 and same(source(call.inputs[0]), source(call.inputs[1])):
            continue  # shares squared: no exponential over its own sum
        if passes or call.op in PRODUCTS or (call.op in DIVISIONS and call.inputs[0] is not None):
            members.add(call)
            parents = call.inputs[:1] if call.op in DIVISIONS else call.inputs
            for parent in parents:
                if parent.param and parent.floating and parent.id not in seen:
                    seen.add(parent.id)
                    queue.append(parent)
    return None


def _power_of_constant(call: Call) -> bool:
    if call.op not in {"aten.pow", "aten.float_power"}:
        return False
    power = call.arg("exponent")
    base = call.args[0]
    return isinstance(power, Value) and power.param and not (isinstance(base, Value) and base.param)


def _scores(call: Call) -> Value:
    value = call.arg("exponent") if call.op in {"aten.pow", "aten.float_power"} else call.inputs[0]
    assert isinstance(value, Value)
    return value


def unshift(scores: Value, *, partition: bool = True) -> tuple[Value, set[Call]]:
    """Take off what is subtracted from every alternative alike: the stabilizing maximum, or (once) log Z itself."""
    members: set[Call] = set()
    while True:
        made = source(scores).call
        if made is None or made.op not in {"aten.sub", "aten.subtract"} or len(made.inputs) != 2:
            return scores, members
        z, shift = made.inputs
        shifter = source(shift).call
        while shifter is not None and shifter.op in MASKS:  # a guard against an infinite maximum
            bounded = [source(v).call for v in shifter.inputs if v.floating and computed(v)]
            members.add(shifter)
            shifter = next((c for c in bounded if c is not None and c.op in EXTREMUM), None)
        while shifter is not None and shifter.op in INDEXERS:  # the maximum of each segment
            shifter = source(shifter.inputs[0]).call
        if shifter is not None and shifter.op in SEGMENTS and same(source(shifter.inputs[-1]), source(z)):
            members |= {made, shifter}
            scores = z
            continue
        if shifter is None or not (shifter.op in EXTREMUM or (partition and shifter.op in LOG_PARTITION)):
            return scores, members
        if not same(source(shifter.inputs[0]), source(z)):
            return scores, members
        members |= {made, shifter}
        scores = z
        if shifter.op in LOG_PARTITION:
            return scores, members


def find(trace: Trace, ratios: list[Ratio], reach: Reach) -> list[Site]:
    """Return the softmax sites of a trace: operators, attention, divisions by a sum of exponentials, log-sum-exp."""
    sites: list[Site] = []
    for call in trace.calls:
        if not any(v.param for v in call.inputs) or not call.outputs or not call.out.floating:
            continue
        if call.op in SOFTMAX:
            sites.append(_operator(call))
        elif call.op in LOG_PARTITION:
            sites.append(_log_partition(call, reach))
        elif call.op in SDPA:
            sites.append(_attention(call))
        elif call.op in _LOGS:
            sites.extend(_log_of_sum(call))
        elif call.op == "aten.exp":
            sites.extend(_exp_of_difference(call, reach))
    sites.extend(site for ratio in ratios if (site := from_ratio(ratio)) is not None)
    return chain(merge([site for site in sites if site.count is None or site.count >= 2], reach))


def _operator(call: Call) -> Site:
    scores = call.inputs[0]
    dim = call.arg("dim")
    rank = len(scores.shape)
    if dim is None:
        dim = 0 if rank in {0, 1, 3} else 1  # torch's implicit choice
    axis = dim % rank - rank if rank else -1
    scores, extra = unshift(scores, partition=False)
    log = "log" in call.op
    label = "LogSoftmax" if log else "Softmax"
    count = scores.shape[axis] if rank else 1
    return Site(
        "em", "softmax", label, {call} | extra, scores, call.out, "log" if log else "vector", count, "units",
        axes=(axis,), op=call.op,
    )  # fmt: skip


def _log_partition(call: Call, reach: Reach) -> Site:
    scores = call.inputs[0]
    rank = len(scores.shape)
    axes = tuple(axis - rank for axis in reduced_axes(call, rank))
    count = math.prod(scores.shape[axis] for axis in axes)
    scores, extra = unshift(scores, partition=False)
    site = Site(
        "em", "softmax", "LogSumExp", {call} | extra, scores, call.out, "log-partition", count, "units",
        axes=axes, op=call.op,
    )  # fmt: skip
    for user in (u for u, _ in descendants(call.out, lambda c: c.op in PASS or c.op in RESHAPES)):
        shifts = user.op in {"aten.sub", "aten.subtract"} and same(source(user.inputs[0]), source(call.inputs[0]))
        if shifts and reach.rank(user.out) >= reach.rank(call.out):
            site.members.add(user)
            site.emitted, site.statistic, site.label = user.out, "log", "LogSoftmax"
            break
    return site


def _attention(call: Call) -> Site:
    keys = call.inputs[1]
    return Site(
        "em", "softmax", "Attention", {call}, call.inputs[0], call.out, "mean", keys.shape[-2], "keys",
        axes=(-1,), op=call.op, attention=call,
    )  # fmt: skip


def _log_of_sum(call: Call) -> list[Site]:
    found = total(call.inputs[0], mean=True)
    if found is None:
        return []
    if call.op == "aten.log1p":
        found.sink, found.constant = True, 1.0
    scores = exponent(found.weights)
    count = math.prod(found.weights.shape[axis] for axis in found.axes)
    if scores is None or not scores[0].param or count < 2:
        return []
    energies, extra = unshift(scores[0])
    members = {call} | found.members | scores[1] | extra
    site = Site(
        "em", "softmax", "LogSumExp", members, energies, call.out, "log-partition", count + found.sink, "units",
        axes=found.axes, op="aten.exp", sink=found.sink, sink_weight=found.constant,
    )  # fmt: skip
    if found.sink:
        site.weights, site.weights_axes, site.guarded = found.weights, found.axes, True
    return [site]


def _exp_of_difference(call: Call, reach: Reach) -> list[Site]:
    """exp(z - log Z): the responsibilities themselves."""
    extra = unshift(call.inputs[0])[1]
    partition = next((c for c in extra if c.op in LOG_PARTITION), None)
    if partition is None:
        return []
    site = _log_partition(partition, reach)
    site.members |= extra | {call}
    return [
        Site(
            "em", "softmax", "Softmax", site.members, site.energies, call.out, "vector", site.count, "units",
            axes=site.axes, op=call.op,
        )
    ]  # fmt: skip


def from_ratio(ratio: Ratio) -> Site | None:
    """Return the site of weights that are exponentials divided by their sum; None if they are no exponentials."""
    scores = exponent(ratio.weights)
    if scores is None:
        return None
    energies, extra = unshift(scores[0])
    if energies.shape != ratio.weights.shape:
        energies = scores[0] if scores[0].shape == ratio.weights.shape else ratio.weights
    members = ratio.members | scores[1] | extra
    return ratio.site("softmax", "Softmax", members, energies, "aten.exp")


_ORDER = {"vector": 0, "mean": 1, "log": 2, "log-partition": 3}


def merge(sites: list[Site], reach: Reach) -> list[Site]:
    """Join sites that share an operator call or normalize the same scores over the same axes. What goes forward, with a
    gradient if there is one, says which statistic it is: not what is kept for monitoring or only makes an index."""
    merged: list[Site] = []
    for site in sites:
        twin = next((s for s in merged if s.members & site.members or _same_competition(s, site)), None)
        if twin is None:
            merged.append(site)
            continue
        twin.members |= site.members
        here, there = reach.rank(site.emitted), reach.rank(twin.emitted)
        first = _ORDER.get(site.statistic, 9) < _ORDER.get(twin.statistic, 9) or _later(site, twin)
        if here > there or (here == there and first):
            twin.emitted, twin.statistic, twin.label = site.emitted, site.statistic, site.label
            twin.energies, twin.axes, twin.count, twin.op = site.energies, site.axes, site.count, site.op
            twin.sign, twin.guarded = site.sign, site.guarded
            twin.weights, twin.weights_axes, twin.denominator = site.weights, site.weights_axes, site.denominator
        twin.sink = twin.sink or site.sink
    return merged


def _later(site: Site, twin: Site) -> bool:
    """Whether a site normalizes again, over another axis, what its twin did: what goes forward sums to one there."""
    if site.statistic != twin.statistic or site.weights is None or twin.weights is None or site.axes == twin.axes:
        return False
    first, last = twin.emitted.call, site.emitted.call
    return first is not None and last is not None and last.id > first.id


def chain(sites: list[Site]) -> list[Site]:
    """Join a normalization of what another one emitted in logs: Sinkhorn's rows and columns."""
    joined: list[Site] = []
    for site in sorted(sites, key=lambda s: s.first):
        before = next((s for s in joined if s.statistic == "log" and source(s.emitted) is source(site.energies)), None)
        if before is None or site.attention is not None:
            joined.append(site)
            continue
        before.members |= site.members
        before.energies, before.emitted, before.axes = site.energies, site.emitted, site.axes
        before.statistic, before.label, before.count = site.statistic, site.label, site.count
    return joined


def _same_competition(a: Site, b: Site) -> bool:
    if a.attention is not None or b.attention is not None:
        return False
    return a.axes == b.axes and same(a.energies, b.energies)


def hidden_by_scores(site: Site) -> bool:
    """Whether the model's own scores decide which alternatives exist (keep-k masks): exact zeros by selection.

    A mask that other scores have decided (an indexer, hashes) only changes which alternatives there are.
    """
    cone, rank = list(ancestors(site.energies, carries)), len(site.energies.shape)
    roots = {v.id for v in cone if v.floating and computed(v) and (v.call is None or not carries(v.call))}
    for value in cone:
        call = value.call
        one_each = call is not None and len(value.shape) == rank and all(value.shape[a] == 1 for a in site.axes)
        if call is not None and call.op in MASKS | SCATTERS and not one_each:
            deciders = [v for v in call.inputs if computed(v) and not v.floating]
            if any(v.id in roots for d in deciders for v in ancestors(d, _decides)):
                return True
    return False


def _decides(call: Call) -> bool:
    """Whether a call is on the way from scores to a mask made of them: no layer, and nothing that only copies a shape."""
    return not (mixes(call) or call.op in CREATES)
