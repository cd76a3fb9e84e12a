"""A comparison as data: what `emscan compare --format json` writes. No torch here.

Field names are the contract of schema version 1; lists hold indices of components, numbers are as in the report.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from emscan.report.document import Evidence, Finding, ModelInfo, ProbeInfo, Status, Verdict

SCHEMA_VERSION = 1

State = Literal["holds", "fails", "unverified"]


@dataclass
class Side:
    """One of the two audits. ``components``, ``dead``, ``starved``, ``findings``: sums over its rows."""

    model: ModelInfo
    probe: ProbeInfo
    status: Status = "ok"
    layers: int = 0
    components: int = 0
    dead: int = 0
    starved: int = 0
    findings: int = 0


@dataclass
class Row:
    """A row that only one report has."""

    index: int
    name: str
    composition: str
    verdict: Verdict
    components: int = 0
    dead: list[int] = field(default_factory=list)


@dataclass
class VerdictChange:
    """Verdict and mechanism, where one of them changed."""

    old: Verdict
    new: Verdict
    old_mechanism: str
    new_mechanism: str


@dataclass
class ListChange:
    """How a list of components changed. ``name``: as in the report: dead, rare, dormant, ...

    ``old`` and ``new`` count it. ``entered`` and ``left`` are null where the row has another number of components than
    before, so that an index is another component. Of ``dead``, what entered died and what left revived.
    """

    name: str
    old: int
    new: int
    entered: list[int] | None = None
    left: list[int] | None = None


@dataclass
class LoadShift:
    """``total_variation``: half the sum of |new - old| over the shares, from 0 to 1; ``index`` moved most."""

    name: str
    total_variation: float
    index: int
    old: float
    new: float


@dataclass
class Number:
    """A number of a row before and after; null where it did not apply."""

    name: str
    old: float | None
    new: float | None


@dataclass
class HeadChange:
    """The mean normalized entropy of one attention head."""

    head: int
    old: float | None
    new: float | None


@dataclass
class EvidenceChange:
    """Whether what was verified still holds; ``differentiable`` is in the two pieces of evidence."""

    old_state: State
    new_state: State
    old: Evidence | None
    new: Evidence | None


@dataclass
class LayerChange:
    """What changed in a row. ``index``, ``composition``, ``count``: of the new report; ``old_...``: of the old one.

    ``information_lost``: in nats, where the posterior says less about the input than before.
    """

    index: int
    old_index: int
    name: str
    composition: str
    old_composition: str
    kind: str | None = None
    count: int | None = None
    old_count: int | None = None
    verdict: VerdictChange | None = None
    lists: list[ListChange] = field(default_factory=list)
    loads: list[LoadShift] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    information_lost: float | None = None
    heads: list[HeadChange] = field(default_factory=list)
    evidence: EvidenceChange | None = None

    @property
    def changed(self) -> bool:
        """Whether there is anything to say about the row."""
        told = (self.verdict, self.lists, self.loads, self.numbers, self.heads, self.evidence)
        return any(told) or self.composition != self.old_composition or self.count != self.old_count

    def list_change(self, name: str) -> ListChange | None:
        """Return the change of one list, None where it is as it was."""
        return next((one for one in self.lists if one.name == name), None)

    def number(self, name: str) -> Number | None:
        """Return the change of one number, None where it is as it was."""
        return next((one for one in self.numbers if one.name == name), None)


@dataclass
class FindingChange:
    """A finding that is new, worse or fixed (then ``finding`` is the old one).

    ``components``: those that make it worse; ``number``: or the number that does.
    """

    change: Literal["new", "worse", "fixed"]
    finding: Finding
    components: list[int] = field(default_factory=list)
    number: Number | None = None


@dataclass
class Sums:
    """Sums over the rows that both reports have; ``died`` ... ``recovered`` count components."""

    rows: int = 0
    changed: int = 0
    verdicts: int = 0
    died: int = 0
    revived: int = 0
    starved: int = 0
    recovered: int = 0
    new_findings: int = 0
    worse_findings: int = 0
    fixed_findings: int = 0


@dataclass
class Gate:
    """A condition of --fail-on: ``value`` is what there is of ``kind``, ``limit`` what is allowed, ``share`` of what."""

    kind: str
    limit: float
    share: bool
    value: float
    met: bool
    where: str | None = None


@dataclass
class Comparison:
    """Two audits compared. ``tolerance``: numbers that moved by no more than this share are not listed.

    ``layers``: the rows that changed. ``same_probe``: False where numbers differ for that reason, too.
    """

    tool: dict[str, str]
    old: Side
    new: Side
    tolerance: float
    same_probe: bool
    notes: list[str] = field(default_factory=list)
    layers: list[LayerChange] = field(default_factory=list)
    removed: list[Row] = field(default_factory=list)
    added: list[Row] = field(default_factory=list)
    findings: list[FindingChange] = field(default_factory=list)
    summary: Sums = field(default_factory=Sums)
    gates: list[Gate] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready data."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
