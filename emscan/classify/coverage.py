"""Where every competition-like operator call went: nothing is passed over in silence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

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
from emscan.trace.origins import reduced_axes

_COMPARISONS = frozenset(
    f"aten.{name}"
    for name in "gt ge lt le greater less greater_equal less_equal eq ne where masked_fill index_put".split()
)
COMPETITIVE = (
    (KINKED - _COMPARISONS) | TWO_WAY | SOFTMAX | LOG_PARTITION | SDPA | MAX_POOL | EXTREMUM | RANKING | BINARY_EXTREMUM
    | frozenset(RECURRENT) | frozenset(f"aten.{name}" for name in "gelu glu erf erfc special_erf atan special_ndtr".split())
)  # fmt: skip

_NORMALIZERS = TWO_WAY | SOFTMAX | LOG_PARTITION | SDPA | frozenset(RECURRENT)


def account(trace: Trace, sites: list[Site], unread: Collection[Call] = ()) -> Coverage:
    """Count, per competition-like operator on parameter-dependent floats, what became of its calls.

    ``in_rows``: it gives a row its mechanism; ``absorbed``: it is part of a row; ``control``: a guard, a scale, an
    index, something nobody uses; ``unclassified``: emscan does not know the operator, or could not read the arithmetic
    around it (``unread``).
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
            if fate == "control" and ((call in unread and trace.is_live(call)) or _competes(call, trace)):
                fate = "unclassified"
                unknown[call.op, call.module or call.where or ""] += 1
            counts.setdefault(call.op, Counter())[fate] += 1
    return Coverage(
        [OpCount(op, c.total(), **{str(k): v for k, v in c.items()}) for op, c in sorted(counts.items())],
        [Unclassified(op, where, n) for (op, where), n in unknown.items()],
    )


def _competes(call: Call, trace: Trace) -> bool:
    """Whether a call that is in no row exponentiates and normalizes computed values that reach the output all the same:
    a row is missing then, and saying nothing would read as clean."""
    if call.op not in _NORMALIZERS or not trace.is_live(call) or not any(v.data and v.param for v in call.inputs):
        return False
    if call.op in TWO_WAY or call.op in RECURRENT:
        return True
    scores = call.inputs[1] if call.op in SDPA else call.inputs[0]
    axes = (-2,) if call.op in SDPA else reduced_axes(call, len(scores.shape))
    return math.prod(scores.shape[axis] for axis in axes) >= 2


def _bearer(site: Site) -> Call | None:
    """Return the competition-like call that gives a site its mechanism: the first of its operator."""
    competing = sorted((call for call in site.members if call.op in COMPETITIVE), key=lambda call: call.id)
    named = [call for call in competing if call.op == site.op]
    return (named or competing or [None])[0]  # type: ignore[list-item]
