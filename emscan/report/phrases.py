"""What the table and the closing lines say about a row and a report, in few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from emscan.report.document import Finding, Layer, Report
from emscan.report.fold import Line


def printable(text: str) -> str:
    """Return the text with what could steer a terminal written out: names come from files that nobody vouches for."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def structure(layer: Layer) -> str:
    """Return the answer to "EM structure?" for a row."""
    if layer.verdict == "em":
        return "Yes (two-way)" if layer.mechanism == "logistic" else "Yes"
    return "No" if layer.verdict != "none" else "-"


def mechanism(layer: Layer) -> str:
    """Return the mechanism, with what qualifies it."""
    return f"{layer.mechanism}, leaky" if layer.leaky else layer.mechanism


def count(layer: Layer) -> str:
    """Return the number of alternatives."""
    if layer.alternatives is None or layer.alternatives.count is None:
        return "-"
    return str(layer.alternatives.count)


def calls(line: Line) -> str:
    """Return what follows the name: how many rows the line stands for, and how often they are called."""
    times = [row.calls for row in line.members]
    if not line.folded:
        return f" (x{times[0]})" if times[0] > 1 else ""
    each = f", x{times[0]} each" if len(set(times)) == 1 else f", x{sum(times)} in all"
    return f" ({len(times)} rows{each if max(times) > 1 else ''})"


def dead(line: Line) -> str:
    """Return "dead/total" of the components of a line."""
    parts = [row.components for row in line.members if row.components is not None]
    return f"{sum(len(p.dead) for p in parts)}/{sum(p.count for p in parts)}" if parts else "-"


def spread(line: Line) -> str:
    """Return the normalized entropy of the responsibilities, or the mean on-rate of a gate's units; of many, the range."""
    found = [row.responsibility for row in line.members if row.responsibility is not None]
    entropies = [r.normalized_entropy for r in found if r.normalized_entropy is not None]
    if entropies:
        return f"H {_range(f'{min(entropies):.2f}', f'{max(entropies):.2f}')}"
    lists = [row.components.on_rate for row in line.members if row.components is not None]
    rates = [[r for r in some or [] if r is not None] for some in lists]
    means = [sum(some) / len(some) for some in rates if some]
    return f"on {_range(_percent(min(means)), _percent(max(means)))}" if means else "-"


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low}..{high}"


def _percent(share: float) -> str:
    """Return a share in few characters; one that is not 0 never reads as 0."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.01 else f"{share:.0%}"


def look_first(line: Line, found: Sequence[Finding]) -> str:
    """Return what deserves a look first in a line; ``found``: the findings about its rows, worst first."""
    severe = [f for f in found if f.level == "error"]
    warnings = [f for f in found if f.level == "warning"]
    said = any(f.rule == "EM201" for f in warnings)  # collapsed: what is starved follows from it
    return (
        (f"{severe[0].rule}: see below" if severe else "")
        or _indices(line, "dead", "dead", 4)
        or _indices(line, "provably dead", "provably_dead", 3)
        or ("" if said else _indices(line, "starved", "starved", 4))
        or (f"{warnings[0].rule}: see below" if warnings else "")
        or _indices(line, "frozen", "frozen", 3)
        or _indices(line, "rare", "rare", 4)
        or _indices(line, "dormant", "dormant", 4)
    )


def _indices(line: Line, word: str, name: str, most: int) -> str:
    """Return the first few components of a list; of many rows, how many have any and which has the largest share."""
    rows = [
        (tag, row.components) for tag, row in zip(line.tags, line.members, strict=True) if row.components is not None
    ]
    hit = [(tag, getattr(parts, name), parts.count) for tag, parts in rows if getattr(parts, name)]
    if not hit:
        return ""
    tag, worst, total = max(hit, key=lambda one: len(one[1]) / max(1, one[2]))
    if not line.folded:
        return f"{word}: {listed(worst, most)}"
    if len(hit) == 1:
        return f"{word} in {tag}: {listed(worst, most)}"
    return f"{word} in {share_of(len(hit), len(line.members))}, worst {tag}: {len(worst)}/{total}"


def share_of(some: int, every: int) -> str:
    """Return how many of the rows of a line."""
    return f"all {every}" if some == every else f"{some} of {every}"


def listed(indices: Sequence[int], most: int) -> str:
    """Return the first few indices, and how many more there are."""
    more = len(indices) - most
    return ", ".join(map(str, indices[:most])) + (f" +{more}" if more > 0 else "")


def hidden(report: Report) -> str | None:
    """Return the line that counts what the table leaves out."""
    left = Counter(layer.mechanism for layer in report.layers if layer.verdict == "none")
    if not left:
        return None
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(left.items()))
    total = left.total()
    return f"{total} layer{'s' if total != 1 else ''} without competition not shown: {kinds} (--all shows them)"


def folding(lines: Sequence[Line]) -> str | None:
    """Return the sentence that says how many rows are folded, and how to see each."""
    many = [line for line in lines if line.folded]
    if not many:
        return None
    rows = sum(len(line.members) for line in many)
    into = f"{len(many)} lines" if len(many) > 1 else "one line"
    return f"{rows} rows that differ only by index share {into} (--all, --layer show each)"


def left_out(report: Report, lines: Sequence[Line], *, all_layers: bool = False, chosen: bool = False) -> list[str]:
    """Return the lines below a table: what it leaves out, and how to see it; ``chosen``: the user named the rows."""
    if chosen:
        return [f"{len(lines)} of {len(report.layers)} layers shown (--layer)"]
    return [line for line in (folding(lines), None if all_layers else hidden(report)) if line]


def structure_only(report: Report) -> bool:
    """Whether the model had no weights, so that nothing but its structure can be told."""
    return not report.model.weights


def notice(report: Report) -> str | None:
    """Return what every number of this report has to be read with."""
    if structure_only(report):
        return "structure only: no weights, so no statistics"
    if report.weights is not None:
        return "WEIGHTS ONLY: there is no architecture, nothing was run; this is of numbers and shapes alone."
    said = []
    if report.model.partial is not None:
        gone = len(report.model.partial.missing) + len(report.model.partial.mismatched)
        if gone:
            said.append(f"PARTIAL WEIGHTS: {gone:,} tensors of the model are not from the file.")
    if report.probe.partial:
        batches, samples = report.probe.batches, report.probe.samples
        said.append(
            f"PARTIAL: interrupted after {batches:,} batch{'es' if batches != 1 else ''} ({samples:,} samples); "
            "all numbers are of these alone."
        )
    if report.probe.synthetic:
        said.append("SYNTHETIC PROBE: inputs were drawn at random; counts and statistics are indicative.")
    return " ".join(said) or None


def closing(report: Report) -> list[str]:
    """Return the closing sentences: what was found, on what probe, and how far that goes."""
    s = report.summary
    rows = s.em + s.soft + s.hard
    if not report.layers:
        advice = next((f"To do: {f.help}" for f in report.findings if f.rule == "EM902" and f.help), None)
        return ["Nothing was classified: this audit is inconclusive.", *([advice] if advice else [])]
    lines = [_structure_line(report, rows), _dead_line(report), _sampled_line(report)]
    if s.status == "inconclusive":
        ops = sorted({u.op for u in report.coverage.unclassified})
        more = f" and {len(ops) - 4} more" if len(ops) > 4 else ""
        lines.append(f"Inconclusive: not classified: {', '.join(ops[:4])}{more}.")
    return [line for line in lines if line]


def _structure_line(report: Report, rows: int) -> str:
    s = report.summary
    if not rows:
        return "No layer competes or gates."
    two_way = f" ({s.em_two_way} of them two-way)" if s.em_two_way else ""
    return f"{s.em} of {rows} competitions and gates {'has' if s.em == 1 else 'have'} EM structure{two_way}."


def _sampled_line(report: Report) -> str:
    """Return what share of the competitions the numbers of long attention rest on."""
    found = [row.responsibility for row in report.layers if row.responsibility is not None]
    some = [(r.sampled, r.competitions) for r in found if r.sampled is not None and r.heads]
    if not some:
        return ""
    measured, every = (sum(numbers) for numbers in zip(*some, strict=True))
    where = "1 row" if len(some) == 1 else f"{len(some)} rows"
    return f"Long attention ({where}): {measured:,} of {every:,} queries measured, evenly spaced."


def _dead_line(report: Report) -> str:
    s, probe = report.summary, report.probe
    if structure_only(report):
        return ""
    if not s.components:
        return f"Probe: {_probe_name(report)}."
    found = f"{s.dead} of {s.components} components are dead on {_probe_name(report)}"
    starved = f", {s.starved} starved" if s.starved else ""
    if probe.synthetic:
        return (
            f"{found}{starved}. The inputs are not data: these counts are indicative; give real samples with --probe."
        )
    bound = 1 - (1 - report.thresholds.confidence) ** (1 / probe.samples) if probe.samples else None
    if bound is None or not s.dead:
        return f"{found}{starved}."
    return (
        f'{found}{starved}. "Dead" speaks of this probe: on inputs like these such a unit fires in at most '
        f"{bound:.2%} of samples ({report.thresholds.confidence:.0%} bound); on other inputs it may fire."
    )


def _probe_name(report: Report) -> str:
    probe = report.probe
    kind = "a SYNTHETIC probe of" if probe.synthetic else "this probe of"
    return f"{kind} {probe.samples:,} sample{'s' if probe.samples != 1 else ''}"
