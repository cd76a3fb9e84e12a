"""What makes `emscan compare` exit 1: --fail-on KIND, KIND=LIMIT, a level or a rule."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from emscan.compare.changes import crossed
from emscan.compare.document import Comparison, FindingChange, Gate, LayerChange
from emscan.errors import UsageError
from emscan.policy.selectors import level_or_selector, selects
from emscan.rules import LEVELS

Value = tuple[float, float, str | None]  # what there is, what 100 % of it would be (0: no share), the row that it is of
Read = Callable[[Comparison], Value]


@dataclass(frozen=True)
class Kind:
    """``what``: for help and the table; ``unit`` follows a number."""

    what: str
    read: Read
    unit: str = ""


def _components(name: str, *, left: bool = False) -> Read:
    """Count what entered or left a list, over all rows; a share is of the new report's components."""

    def read(found: Comparison) -> Value:
        counts = [(crossed(change.list_change(name), left=left), change.name) for change in found.layers]
        return sum(count for count, _ in counts), found.new.components, max(counts)[1] if counts else None

    return read


def _largest(read: Callable[[LayerChange], tuple[float, float]]) -> Read:
    """Take the row in which a number moved most; the second number is what a share would be of."""

    def over_rows(found: Comparison) -> Value:
        values = [(*read(change), change.name) for change in found.layers]
        return max(values, key=lambda one: one[0], default=(0.0, 0.0, None))

    return over_rows


def _information(change: LayerChange) -> tuple[float, float]:
    number = change.number("information")
    return change.information_lost or 0.0, (number.old or 0.0) if number is not None else 0.0


def _entropy(change: LayerChange) -> tuple[float, float]:
    number = change.number("normalized_entropy")
    rows = [abs(number.new - number.old)] if number and number.new is not None and number.old is not None else []
    heads = [abs(h.new - h.old) for h in change.heads if h.new is not None and h.old is not None]
    return max(rows + heads, default=0.0), 1.0


def _effective(change: LayerChange) -> tuple[float, float]:
    number = change.number("effective_components")
    if number is None or number.old is None or number.new is None:
        return 0.0, 0.0
    return max(0.0, number.old - number.new), number.old


def _load(change: LayerChange) -> tuple[float, float]:
    return max((shift.total_variation for shift in change.loads), default=0.0), 1.0


def _broken(change: LayerChange) -> bool:
    proof = change.evidence
    if proof is None:
        return False
    was = proof.old is not None and proof.old.differentiable is not False
    cut = was and proof.new is not None and proof.new.differentiable is False
    return (proof.old_state == "holds" and proof.new_state != "holds") or cut


def _rows(holds: Callable[[LayerChange], bool]) -> Read:
    def read(found: Comparison) -> Value:
        names = [change.name for change in found.layers if holds(change)]
        return len(names), found.summary.rows, names[0] if names else None

    return read


def _findings(which: Callable[[FindingChange], bool]) -> Read:
    def read(found: Comparison) -> Value:
        hit = [change.finding for change in found.findings if change.finding.suppressed is None and which(change)]
        return len(hit), 0.0, hit[0].layer if hit else None

    return read


KINDS: dict[str, Kind] = {
    "verdict": Kind("rows whose verdict changed", _rows(lambda change: change.verdict is not None)),
    "died": Kind("components that died", _components("dead")),
    "revived": Kind("components that revived", _components("dead", left=True)),
    "starved": Kind("components that became starved", _components("starved")),
    "dormant": Kind("units that became dormant", _components("dormant")),
    "rare": Kind("units that became rare", _components("rare")),
    "frozen": Kind("units that became frozen", _components("frozen")),
    "information": Kind("most information lost in a row", _largest(_information), "nats"),
    "entropy": Kind("largest change of a normalized entropy", _largest(_entropy)),
    "effective": Kind("most effective components lost in a row", _largest(_effective)),
    "load": Kind("largest load shift (total variation)", _largest(_load)),
    "evidence": Kind("rows whose evidence no longer holds", _rows(_broken)),
    "removed": Kind("rows that only the old report has", lambda found: (len(found.removed), 0.0, None)),
    "added": Kind("rows that only the new report has", lambda found: (len(found.added), 0.0, None)),
    "new-findings": Kind("new findings", _findings(lambda change: change.change == "new")),
    "worse-findings": Kind("findings that are worse", _findings(lambda change: change.change == "worse")),
    "probe": Kind("other probe", lambda found: (float(not found.same_probe), 0.0, None)),
}
_SHARES = frozenset({
    "died", "revived", "starved", "dormant", "rare", "frozen", "information", "entropy", "effective", "load", "verdict",
    "evidence",
})  # fmt: skip
HELP = (
    f"Exit 1 on: {', '.join(KINDS)}; KIND=LIMIT or KIND=SHARE%: on more than that; a level or a rule: on such findings, "
    "new or worse. May be repeated."
)


@dataclass(frozen=True)
class Condition:
    """A parsed --fail-on: ``kind`` has no more than ``limit`` where it is met."""

    text: str
    kind: Kind
    limit: float = 0.0
    share: bool = False

    def judge(self, found: Comparison) -> Gate:
        """Return what there is of it, and whether that is within the limit."""
        value, whole, where = self.kind.read(found)
        limit = self.limit * whole if self.share else self.limit
        met = value <= limit + 1e-9 * max(1.0, abs(limit))
        return Gate(self.text, self.limit, self.share, value, met, None if met else where)


def condition(text: str) -> Condition:
    """Return the condition that an option names. Raises UsageError that says what to write instead."""
    written, equals, amount = (part.strip() for part in text.partition("="))
    name = written.lower()
    if name in KINDS:
        limit, share = _limit(text, name, amount) if equals else (0.0, False)
        return Condition(name, KINDS[name], limit, share)
    near = difflib.get_close_matches(name, [*KINDS, *LEVELS], 1)
    if near and not name.startswith("em") and name not in LEVELS:
        raise UsageError(f"--fail-on {text}: no such kind", f"did you mean {near[0]}?")
    try:
        which = level_or_selector(written)
    except ValueError as error:
        hint = "" if name.startswith("em") else f"or use one of {', '.join(KINDS)}"
        raise UsageError(f"--fail-on {text}: {error}", hint) from None
    limit, share = _limit(text, name, amount) if equals else (0.0, False)
    hits = _findings(lambda change: change.change != "fixed" and selects(which, change.finding))
    return Condition(which, Kind(f"new or worse findings of {which}", hits), limit, share)


def _limit(text: str, name: str, amount: str) -> tuple[float, bool]:
    share = amount.endswith("%")
    try:
        number = float(amount.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf or (share and (number > 100 or name not in _SHARES)):
        more = " or a share such as 5%" if name in _SHARES else ""
        raise UsageError(f"--fail-on {text}: {amount or 'nothing'} is no limit", f"write a number{more}")
    return (number / 100, True) if share else (number, False)
