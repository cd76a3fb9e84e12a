"""What a change is called, in few words and with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emscan.compare.document import Comparison, EvidenceChange, Gate, LayerChange, ListChange, Number, Side
from emscan.report.document import Finding, ProbeInfo

_UNITS = {"entropy": " nats", "information": " nats"}
_NAMES = {
    "entropy": "mean entropy", "normalized_entropy": "normalized entropy", "effective_components": "effective components",
    "max_violation": "max_violation", "hard_fraction": "hard fraction", "mean": "mean r", "provably_dead": "provably dead",
    "soft_load": "soft load",
}  # fmt: skip
_ENTERED = {"dead": "died", "starved": "became starved"}
_LEFT = {"dead": "revived"}


def ranges(indices: Sequence[int]) -> str:
    """Return sorted indices, three or more in a row as a range: 0-3, 7, 9."""
    parts: list[str] = []
    start = 0
    for place in range(1, len(indices) + 1):
        if place < len(indices) and indices[place] == indices[place - 1] + 1:
            continue
        run = indices[start:place]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(i) for i in run]
        start = place
    return ", ".join(parts)


def pair(old: float | None, new: float | None, unit: str = "") -> str:
    """Return "0.43 -> 0.51", with as many digits as it takes to see that they differ."""
    if old is None or new is None:
        return f"{one(old, 3)} -> {one(new, 3)}{unit if new is not None else ''}"
    digits = next((d for d in range(3, 10) if f"{old:.{d}g}" != f"{new:.{d}g}"), 10)
    return f"{one(old, digits)} -> {one(new, digits)}{unit}"


def one(value: float | None, digits: int = 3) -> str:
    """Return a number in as many digits."""
    if value is None:
        return "none"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def number(change: Number) -> str:
    """Return a number that changed."""
    return f"{_NAMES.get(change.name, change.name)} {pair(change.old, change.new, _UNITS.get(change.name, ''))}"


def sentences(change: LayerChange) -> Iterator[str]:
    """Yield what changed in a row, what matters most first."""
    if change.composition != change.old_composition:
        yield f"was {change.old_composition}"
    if change.verdict is not None:
        v = change.verdict
        yield f"verdict {v.old} ({v.old_mechanism}) -> {v.new} ({v.new_mechanism})"
    if change.old_count != change.count:
        yield f"{change.old_count or 0} -> {change.count or 0} {change.kind}"
    for one in change.lists:
        yield from _list(one, change)
    for shift in change.loads:
        kind = (change.kind or "components").removesuffix("s" if change.kind != "classes" else "es")
        most = f"most {kind} {shift.index}, {pair(shift.old, shift.new)}"
        yield f"{_NAMES.get(shift.name, shift.name)} shift {shift.total_variation:.3g} (total variation; {most})"
    if change.evidence is not None:
        yield _evidence(change.evidence)
    if change.numbers:
        yield ", ".join(number(one) for one in change.numbers)
    if change.heads:
        head = max(change.heads, key=lambda one: abs((one.new or 0) - (one.old or 0)))
        many = f"{len(change.heads)} heads" if len(change.heads) > 1 else "1 head"
        yield f"normalized entropy of {many}, most head {head.head}: {pair(head.old, head.new)}"


def _list(moves: ListChange, change: LayerChange) -> Iterator[str]:
    name = _NAMES.get(moves.name, moves.name)
    total = f"{name} {moves.old} -> {moves.new} of {change.count}"
    if moves.entered is None or moves.left is None:
        yield f"{name} {moves.old} of {change.old_count or 0} -> {moves.new} of {change.count or 0}"
        return
    if moves.entered:
        yield f"{_ENTERED.get(moves.name, f'became {name}')}: {ranges(moves.entered)} ({total})"
    if moves.left:
        after = "" if moves.entered else f" ({total})"
        yield f"{_LEFT.get(moves.name, f'no longer {name}')}: {ranges(moves.left)}{after}"


def _evidence(change: EvidenceChange) -> str:
    said = f"evidence {change.old_state} -> {change.new_state}"
    if change.old_state == change.new_state:
        said = "evidence"
    old, new = change.old, change.new
    if old is not None and new is not None and old.differentiable != new.differentiable:
        words = {True: "differentiable", False: "not differentiable", None: "unknown"}
        said += f", posterior {words[old.differentiable]} -> {words[new.differentiable]}"
    if change.new_state == "fails" and new is not None:
        errors = [error for error in (new.sum_error, new.gradient_error) if error is not None]
        said += f", off by {max(errors):.2g}, tolerance {new.tolerance:.2g}"
    return said


def eventful(change: LayerChange) -> bool:
    """Whether more than numbers changed."""
    lists = {one.name for one in change.lists} & {"dead", "starved", "provably_dead"}
    return bool(lists or change.verdict or change.evidence or change.count != change.old_count)


def probes(found: Comparison) -> str:
    """Return what both audits ran on."""
    if found.same_probe:
        return f"probe: the same for both, {probe(found.new.probe)}"
    return f"probe: OTHER for the new one: {probe(found.old.probe)} -> {probe(found.new.probe)}"


def probe(info: ProbeInfo) -> str:
    """Return a probe in few words."""
    source = f"SYNTHETIC, seed {info.seed}" if info.synthetic else info.source
    return f"{source}, {info.samples:,} sample{'s' if info.samples != 1 else ''}"


def side(found: Side) -> str:
    """Return what a report comes to."""
    status = "" if found.status == "ok" else f"; {found.status}"
    counts = f"{found.dead} of {found.components} components dead, {found.starved} starved"
    return f"{found.model.path or 'model'}: {counts}{status}"


def summary(found: Comparison) -> str:
    """Return the sums in one sentence."""
    s = found.summary
    parts = [
        f"{s.changed} of {s.rows} row{'s' if s.rows != 1 else ''} changed",
        *_counts((s.verdicts, "verdict"), plural="s"),
        *_counts(
            (s.died, "died"), (s.revived, "revived"), (s.starved, "became starved"), (s.recovered, "no longer starved")
        ),
        *_counts((len(found.removed), "removed"), (len(found.added), "added")),
    ]
    findings = _counts((s.new_findings, "new"), (s.worse_findings, "worse"), (s.fixed_findings, "fixed"))
    return f"{', '.join(parts)}. Findings: {', '.join(findings) or 'none new, worse or fixed'}."


def _counts(*counts: tuple[int, str], plural: str = "") -> list[str]:
    return [f"{count:,} {name}{plural if count != 1 else ''}" for count, name in counts if count]


def worse(finding: Finding, components: Sequence[int], change: Number | None) -> str:
    """Return a finding's message and what makes it worse."""
    if change is not None:
        return f"{finding.message} [{number(change)}]"
    return f"{finding.message} [more: {ranges(components)}]" if components else finding.message


def gate(found: Gate, what: str, unit: str) -> str:
    """Return a condition of --fail-on and whether it is met."""
    allowed = f"{100 * found.limit:.10g}%" if found.share else f"{found.limit:.10g}"
    where = f" (in {found.where})" if found.where else ""
    said = f"{what}: {found.value:.6g}{f' {unit}' if unit else ''}, allowed {allowed}{where}"
    return f"{'ok    ' if found.met else 'FAILED'} {found.kind}: {said}"
