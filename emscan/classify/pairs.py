"""Softmax over alternatives that stand in separate values: logaddexp(a, b), exp(a) / (exp(a) + exp(b))."""

from __future__ import annotations

from emscan.classify.flow import DIVISIONS, computed, same, source
from emscan.classify.regions import Regions
from emscan.classify.site import Site
from emscan.classify.softmax import EXPONENTIALS
from emscan.trace.graph import Call, Trace, Value

_LOG_SUMS = frozenset({"aten.logaddexp", "aten.logaddexp2"})


def find(trace: Trace, regions: Regions, claimed: set[Call]) -> list[Site]:
    """Return sites whose K >= 2 alternatives are entries of different values of one shape."""
    sites: list[Site] = []
    for call in trace.calls:
        if call in claimed or not call.outputs:
            continue
        found = None
        if call.op in _LOG_SUMS and all(computed(v) for v in call.inputs):
            found = _log_sum(call, regions)
        elif call.op in DIVISIONS and len(call.inputs) == 2:
            found = _share(call)
        if found is not None:
            sites = [site for site in sites if not site.members <= found.members]
            sites.append(found)
    return sites


def _log_sum(call: Call, regions: Regions) -> Site | None:
    """A chain of logaddexp over values of different origin: one alternative per value."""
    if regions.base(call.inputs[0]) is regions.base(call.inputs[1]):
        return None
    members, terms = {call}, list[Value]()
    stack = list(call.inputs[:2])
    while stack:
        value = stack.pop()
        inner = value.call
        if inner is not None and inner.op in _LOG_SUMS and all(computed(v) for v in inner.inputs):
            members.add(inner)
            stack.extend(inner.inputs[:2])
        else:
            terms.append(value)
    return _site("LogSumExp", members, terms, call.out, "log-partition")


def _share(call: Call) -> Site | None:
    """One exponential over the sum of several, itself among them."""
    members, terms = {call}, list[Value]()
    stack = [call.inputs[1]]
    while stack:
        value = source(stack.pop())
        inner = value.call
        if inner is not None and inner.op == "aten.add" and len(inner.inputs) == 2 and all(map(computed, inner.inputs)):
            members.add(inner)
            stack.extend(inner.inputs)
        else:
            terms.append(value)
    makers = [term.call for term in terms]
    if len(terms) < 2 or not all(maker is not None and maker.op in EXPONENTIALS for maker in makers):
        return None
    if not any(same(source(call.inputs[0]), term) for term in terms) or len({term.shape for term in terms}) > 1:
        return None
    members |= {maker for maker in makers if maker is not None}
    return _site("Softmax", members, [maker.inputs[0] for maker in makers if maker is not None], call.out, "vector")


def _site(label: str, members: set[Call], terms: list[Value], emitted: Value, statistic: str) -> Site:
    op = "aten.logaddexp" if statistic == "log-partition" else "aten.exp"
    site = Site(
        "em", "softmax", label, members, terms[-1], emitted, statistic, len(terms), "units", axes=(), op=op,  # type: ignore[arg-type]
    )  # fmt: skip
    site.terms = terms
    site.notes.append("the alternatives stand in separate values")
    return site
