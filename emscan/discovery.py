"""One audit in progress: rows as traced runs find them, and the accumulators that further runs feed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emscan.classify import Classification, Row, classify
from emscan.classify.coverage import COMPETITIVE
from emscan.classify.declared import Declared, declared
from emscan.classify.evidence import gather
from emscan.classify.site import Site
from emscan.measure import Meter, meter_for
from emscan.measure.answers import Answers
from emscan.measure.limits import Room
from emscan.probe import Batch
from emscan.probe.batch import part
from emscan.probe.layout import sequence_first
from emscan.report.document import (
    Alternatives,
    Conditions,
    Coverage,
    Evidence,
    Layer,
    Thresholds,
    Unclassified,
)
from emscan.state import afresh, generators, restore_generators
from emscan.trace.follow import Taps, feed, follow
from emscan.trace.graph import NotKeptError, Trace
from emscan.trace.leaves import parameter_names
from emscan.trace.record import named_inputs, record

_KEPT = 1 << 26  # bytes of values that discovery keeps at first,
_KEPT_SHARE = 1 / 8  # or this share of what the process takes up by then, if it is more;
_KEPT_MOST = 1 << 29  # where something that is needed was left out then,
_KEPT_ALL = 1 << 60  # and where a row cannot be told without it
_FEW = 8  # samples that discovery looks at, at most
_WHOLE = 4  # samples up to which a batch is looked at whole: a loop over them is then counted right
_DISCOVERIES = 16  # batches that may bring new branches before the rest is left unclassified


@dataclass
class _Look:
    """One traced run and what was found in it. ``lacking``: something that was too large to keep was asked for."""

    trace: Trace
    drawn: Any  # what the random generators had come to, where the run was of a whole batch
    found: Classification
    proofs: dict[object, Evidence]  # by row
    lacking: bool


@dataclass
class _Measured:
    """A row, its accumulator and its evidence."""

    row: Row
    meter: Meter | None
    evidence: Evidence | None = None
    left: str | None = None  # why it is not measured


@dataclass
class Audit:
    """State of one audit in progress."""

    model: nn.Module
    thresholds: Thresholds
    objective: str
    weights: bool = True  # without them there is nothing to measure
    rows: dict[object, _Measured] = field(default_factory=dict)
    order: list[object] = field(default_factory=list)
    taps: Taps = field(default_factory=Taps)
    room: Room = field(default_factory=Room)
    coverage: Coverage = field(default_factory=Coverage)
    goal: str = "none"
    answers: Answers | None = None  # how right the output is, where there are targets,
    answering: object = None  # and the row that it belongs to
    says: Declared | None = None  # what the saved configuration names as the loss
    discoveries: int = 0

    def __post_init__(self) -> None:
        self.says = declared(self.model)

    def discover(self, batch: Batch, few: bool, *, compare: bool = True) -> bool:
        """Trace a batch or part of it, classify it and start to watch what is new; return whether it is measured, too.

        ``compare``: its targets have not been looked at yet.
        """
        self.discoveries += 1
        look = self._look(batch, few)
        trace, found = look.trace, look.found
        if few and trace.inputs and _over_samples(found, self._sample_axis(batch)):
            del look, trace, found  # the samples themselves compete: K is the length of the batch, not of a part of it
            self.discoveries -= 1
            return self.discover(batch, few=False)
        first = not self.rows
        if first:
            self.goal = f"{found.objective.name} ({found.objective.reason})"
            self.answers = Answers.to(found.objective, trace, self.taps) if self.weights else None
            self.answering = next((r.key for r in found.rows if found.objective.through in r.sites), None)
        place = 0
        for row in found.rows:
            place = self._adopt(row, found, look.proofs, place, first)
        self.coverage = found.coverage if first else _joined(self.coverage, found.coverage)
        self.taps.known |= {call.key for call in trace.calls}
        self.taps.settle(trace)
        fed = look.drawn is not None and self.weights and self._feed(trace, batch, look.drawn, compare)
        _forget(trace)
        del look, trace, found
        _return_memory()
        return fed

    def _look(self, batch: Batch, few: bool) -> _Look:
        """Trace, classify and verify; once more, with more numbers kept, where some were missed."""
        try:
            seen = self._classified(batch, few, _budget())
            if seen.lacking:
                del seen
                return self._classified(batch, few, _KEPT_MOST)
            return seen
        except NotKeptError:
            return self._classified(batch, few, _KEPT_ALL)

    def _classified(self, batch: Batch, few: bool, budget: int) -> _Look:
        trace, targets, drawn = self._record(batch, few, budget)
        names = parameter_names(self.model)
        found = classify(
            trace, names, objective_name=self.objective, targets=targets, all_targets=batch.targets, says=self.says
        )
        lacking = any(value.missed for value in trace.values)  # before evidence, for which excerpts may be enough
        proofs = self._proofs(found) if self.weights else {}
        unproven = any(proof.gradient_error is None for proof in proofs.values())
        lacking = lacking or (unproven and any(value.dropped for value in trace.values))
        return _Look(trace, drawn, found, proofs, lacking)

    def _proofs(self, found: Classification) -> dict[object, Evidence]:
        """Return the evidence of every row that is new."""
        goal, proofs = found.objective, {}
        for row in found.rows:
            if row.key not in self.rows and row.key not in proofs and row.site is not None and row.site.verdict == "em":
                targets = goal.targets if row.site is goal.through else None
                proofs[row.key] = gather(row.site, found.trace, self.thresholds.evidence, targets)
        return proofs

    def _feed(self, trace: Trace, batch: Batch, drawn: Any, compare: bool) -> bool:
        """Measure a batch by what its trace has kept, rather than run it again."""
        outputs = [value.held for value in trace.outputs if value.held is not None]
        if len(outputs) < len(trace.outputs) or not feed(trace, self.taps):
            return False
        restore_generators(drawn)  # the next batch goes on from here
        if self.answers is not None and compare:
            self.answers.see(outputs, batch.targets, list(named_inputs(batch.args, batch.kwargs).values()))
        return True

    def _sample_axis(self, batch: Batch) -> int:
        return 1 if sequence_first(self.model, list(named_inputs(batch.args, batch.kwargs).values())) else 0

    def _record(self, batch: Batch, few: bool, budget: int) -> tuple[Trace, Tensor | None, Any]:
        """Trace a few samples, or the whole batch where a model insists on its size: then with what the random
        generators have come to."""
        count = min(batch.samples, max(2, min(_FEW, batch.samples // 16)))
        inputs = list(named_inputs(batch.args, batch.kwargs).values())
        axis = self._sample_axis(batch)
        if (
            few
            and batch.samples > _WHOLE
            and count < batch.samples
            and all(t.dim() > axis and t.shape[axis] == batch.samples for t in inputs)
        ):
            with contextlib.suppress(Exception):  # a model may insist on the batch size it was exported with
                cut = part(batch, 0, count, axis)
                with afresh(self.model, rehearsal=True):
                    return record(self.model, cut.args, cut.kwargs, budget=budget), cut.targets, None
        with afresh(self.model, rehearsal=True):
            return record(self.model, batch.args, batch.kwargs, budget=budget), batch.targets, generators()

    def _adopt(self, row: Row, found: Classification, proofs: dict[object, Evidence], place: int, first: bool) -> int:
        """Add a row, or further calls of one that is known; return where the next one belongs."""
        known = self.rows.get(row.key)
        if known is None:
            measured = row.site is not None and self.weights
            left = self.room.refuses(row.site, found.axes) if measured and row.site is not None else None
            meter = meter_for(row.site, self.thresholds) if measured and row.site is not None and not left else None
            known = self.rows[row.key] = _Measured(row, meter, proofs.get(row.key), left)
            self.order.insert(place if not first else len(self.order), row.key)
            new = row.sites
        else:
            seen = {site.emitted.key for site in known.row.sites}  # the same name is measured already
            new = [site for site in row.sites if site.emitted.key not in seen]
            known.row.sites.extend(new)
            known.row.calls = max(known.row.calls, row.calls)
        if known.meter is not None:
            for site in new:
                known.meter.attach(site, found.axes, self.taps)
        return self.order.index(row.key) + 1

    def measure(self, batch: Batch) -> None:
        """Run one batch under the taps; look again at a batch that takes branches not seen before."""
        unseen = self._follow(batch)
        if not unseen:
            return
        if self.discoveries >= _DISCOVERIES:
            self._leave(unseen)
            return
        before = self.taps
        self.taps = Taps(known=before.known)
        if not self.discover(batch, few=False, compare=False):
            self._follow(batch, compare=False)
        _add(before, self.taps)
        self.taps = before

    def _follow(self, batch: Batch, compare: bool = True) -> set[str]:
        """Run one batch under the taps; return the operators in computations not seen before.

        ``compare``: its targets have not been looked at yet.
        """
        with afresh(self.model):
            outputs, unseen = follow(self.model, batch.args, batch.kwargs, self.taps, COMPETITIVE)
        if self.answers is not None and compare:
            self.answers.see(outputs, batch.targets, list(named_inputs(batch.args, batch.kwargs).values()))
        return unseen

    def layers(self, samples: int) -> list[Layer]:
        """Return the rows of the report, after a probe of so many samples."""
        found = [_layer(index, self.rows[key], samples) for index, key in enumerate(self.order)]
        calibration = self.answers.result() if self.answers is not None else None
        for key, layer in zip(self.order, found, strict=True):
            if calibration is not None and key == self.answering and layer.responsibility is not None:
                layer.responsibility.calibration = calibration
        return found

    def _leave(self, unseen: set[str]) -> None:
        """Count operators in branches that came too late to be looked at: the audit is inconclusive about them."""
        where = "a branch of a later batch"
        left = {u.op: u for u in self.coverage.unclassified if u.where == where}
        for op in sorted(unseen):
            if op in left:
                left[op].calls += 1
            else:
                self.coverage.unclassified.append(Unclassified(op, where, 1))


def _over_samples(found: Classification, axis: int) -> bool:
    """Whether alternatives of some row run along the sample axis of an input."""
    for site in (row.site for row in found.rows if row.site is not None):
        dims = found.axes.of(site.energies)
        along = [dims[a] for a in site.axes if site.form is None and -a <= len(dims)]
        if any(factor.origin.kind == "input" and factor.origin.dim == axis for dim in along for factor in dim):
            return True
    return False


def _add(taps: Taps, new: Taps) -> None:
    for mine, theirs in ((taps.values, new.values), (taps.calls, new.calls)):
        for key, roles in theirs.items():
            mine.setdefault(key, {}).update(roles)
    taps.known |= new.known


def _joined(a: Coverage, b: Coverage) -> Coverage:
    """Coverage of two traces of one model: per operator, the trace that called it more often."""
    counts = {count.op: count for count in a.calls}
    for count in b.calls:
        if count.op not in counts or count.calls > counts[count.op].calls:
            counts[count.op] = count
    unknown = {(u.op, u.where): u for u in (*a.unclassified, *b.unclassified)}
    return Coverage([counts[op] for op in sorted(counts)], list(unknown.values()))


def _forget(trace: Trace) -> None:
    """Let go of the numbers of a trace, except parameters and the constants that a gate is run with again."""
    kept = {v.id for call in trace.calls for v in call.inputs if not (v.data and v.param)}
    for value in trace.values:
        if value.leaf not in {"param", "buffer"} and (value.id not in kept or value.data):
            value.tensor = value.few = None
    for call in trace.calls:
        call.excerpt = ()


def _budget() -> int:
    """Return how many bytes of values discovery keeps: what is larger is verified by excerpts."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return max(_KEPT, int(pages * os.sysconf("SC_PAGE_SIZE") * _KEPT_SHARE))
    except (OSError, ValueError, IndexError):  # not on Linux
        return _KEPT


def _return_memory() -> None:
    """Hand freed memory back to the system: what discovery kept would otherwise stay on top of the probe's own peak."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _layer(index: int, measured: _Measured, samples: int) -> Layer:
    """Return the row of the report."""
    row, site = measured.row, measured.row.site
    layer = Layer(
        index, row.name, row.module, row.composition, "none", None, row.mechanism, calls=row.calls, note=row.note
    )
    if site is None:
        return layer
    layer.verdict = site.verdict
    layer.em_compatible = site.verdict == "em"
    layer.leaky = bool(site.leaky) if site.mechanism == "threshold" else None
    layer.statistic = site.statistic
    axis = site.axes[0] if len(site.axes) == 1 and site.kind not in {"sign", "on-off", "window"} else None
    layer.alternatives = Alternatives(site.kind, site.count, axis, site.persistent)
    em = site.verdict == "em"
    layer.conditions = Conditions(True, em, em and site.differentiable)
    layer.evidence = measured.evidence
    layer.source = _source(site)
    layer.flags = list(dict.fromkeys(flag for s in row.sites for flag in s.flags))
    notes = [row.note] if row.note else []
    if site.sink:
        notes.append(f"one alternative is a sink of {'learned' if site.learned_sink else 'fixed'} energy")
    if site.kind == "batch" and "contrast" not in site.flags:
        notes.append("the softmax runs over the batch")
    left = [measured.left] if measured.left else []
    layer.flags += ["unmeasured"] if left else []
    layer.note = "; ".join(dict.fromkeys([*notes, *site.notes, *left])) or None
    if measured.meter is not None:
        layer.components, layer.responsibility, flags = measured.meter.finish(samples)
        layer.flags += [flag for flag in flags if flag not in layer.flags]
        spread = layer.responsibility
        if spread is not None and spread.sampled is not None and spread.sampled < spread.competitions:
            said = f"{spread.sampled:,} of {spread.competitions:,} competitions sampled"
            layer.note = "; ".join(filter(None, [layer.note, said]))
        if "uneven" in flags:
            layer.note = "; ".join(
                filter(None, [layer.note, "the number of units changes with the input: not measured"])
            )
    return layer


def _source(site: Site) -> str | None:
    """Return ``file:line`` of the code that runs a site; below the working directory from there, as reports travel."""
    where = next((call.where for call in sorted(site.members, key=lambda call: call.id) if call.where), None)
    if where is None:
        return None
    with contextlib.suppress(OSError):  # the working directory may be gone
        where = where.removeprefix(f"{Path.cwd()}{os.sep}")
    return where
