"""Where every competition-like operator call went: nothing is passed over in silence."""

from __future__ import annotations

from collections import Counter

from emscan.classify.logistic import OPERATORS as TWO_WAY
from emscan.classify.regions import KINKED
from emscan.classify.site import Site
from emscan.report.document import Coverage, OpCount, Unclassified
from emscan.trace.graph import Call, Trace
from emscan.trace.operators import (
    BINARY_EXTREMUM,
    EXTREMUM,
    LOG_PARTITION,
    MAX_POOL,
    RANKING,
    RECURRENT,
    SDPA,
    SOFTMAX,
    known,
)

_COMPARISONS = frozenset(
    f"aten.{name}"
    for name in "gt ge lt le greater less greater_equal less_equal eq ne where masked_fill index_put".split()
)
COMPETITIVE = (
    (KINKED - _COMPARISONS) | TWO_WAY | SOFTMAX | LOG_PARTITION | SDPA | MAX_POOL | EXTREMUM | RANKING | BINARY_EXTREMUM
    | frozenset(RECURRENT) | frozenset(f"aten.{name}" for name in "gelu glu erf erfc special_erf atan special_ndtr".split())
)  # fmt: skip


def account(trace: Trace, sites: list[Site]) -> Coverage:
    """Count, per competition-like operator on parameter-dependent floats, what became of its calls.

    ``in_rows``: it gives a row its mechanism; ``absorbed``: it is part of a row; ``control``: a guard, a scale, an
    index, something nobody uses; ``unclassified``: emscan does not know the operator.
    """
    carrying = {_bearer(site) for site in sites}
    absorbed = {call for site in sites for call in site.members}
    counts: dict[str, Counter[str]] = {}
    unknown: Counter[tuple[str, str]] = Counter()
    for call in trace.calls:
        floats = any(v.param and v.floating for v in call.inputs)
        if not known(call.op) and floats:
            unknown[call.op, call.module or call.where or ""] += 1
            counts.setdefault(call.op, Counter())["unclassified"] += 1
        elif call.op in COMPETITIVE and floats:
            fate = "in_rows" if call in carrying else "absorbed" if call in absorbed else "control"
            counts.setdefault(call.op, Counter())[fate] += 1
    return Coverage(
        [OpCount(op, c.total(), **{str(k): v for k, v in c.items()}) for op, c in sorted(counts.items())],
        [Unclassified(op, where, n) for (op, where), n in unknown.items()],
    )


def _bearer(site: Site) -> Call | None:
    """Return the competition-like call that gives a site its mechanism: the first of its operator."""
    competing = sorted((call for call in site.members if call.op in COMPETITIVE), key=lambda call: call.id)
    named = [call for call in competing if call.op == site.op]
    return (named or competing or [None])[0]  # type: ignore[list-item]
