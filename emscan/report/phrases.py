"""What the table and the closing lines say about a row and a report, in few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from emscan.report.document import Layer, Report


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


def dead(layer: Layer) -> str:
    """Return "dead/total" of the row's components."""
    return f"{len(layer.components.dead)}/{layer.components.count}" if layer.components is not None else "-"


def spread(layer: Layer) -> str:
    """Return the normalized entropy of the responsibilities, or the mean on-rate of a gate's units."""
    found = layer.responsibility
    if found is not None and found.normalized_entropy is not None:
        return f"H {found.normalized_entropy:.2f}"
    rates = [r for r in (layer.components.on_rate if layer.components else None) or [] if r is not None]
    return f"on {_percent(sum(rates) / len(rates))}" if rates else "-"


def _percent(share: float) -> str:
    """Return a share in few characters; one that is not 0 never reads as 0."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.01 else f"{share:.0%}"


def look_first(layer: Layer, report: Report) -> str:
    """Return what deserves a look first in a row."""
    mine = [f for f in report.findings if f.layer_index == layer.index]
    parts = layer.components
    if any(f.level == "error" for f in mine):
        return next(f"{f.rule}: see below" for f in mine if f.level == "error")
    if parts is not None and parts.dead:
        return f"dead: {listed(parts.dead, 4)}"
    if parts is not None and parts.provably_dead:
        return f"provably dead: {listed(parts.provably_dead, 3)}"
    warnings = [f for f in mine if f.level == "warning"]
    if parts is not None and parts.starved and not any(f.rule == "EM201" for f in warnings):
        return f"starved: {listed(parts.starved, 4)}"
    if warnings:
        return f"{warnings[0].rule}: see below"
    if parts is not None and parts.frozen:
        return f"frozen: {listed(parts.frozen, 3)}"
    if parts is not None and parts.rare:
        return f"rare: {listed(parts.rare, 4)}"
    if parts is not None and parts.dormant:
        return f"dormant: {listed(parts.dormant, 4)}"
    return ""


def listed(indices: Sequence[int], most: int) -> str:
    """Return the first few indices, and how many more there are."""
    more = len(indices) - most
    return ", ".join(map(str, indices[:most])) + (f" +{more}" if more > 0 else "")


def shown(report: Report, all_layers: bool) -> list[Layer]:
    """Return the rows of the table: those with a competition or gate, or all."""
    return [layer for layer in report.layers if all_layers or layer.verdict != "none"]


def hidden(report: Report) -> str | None:
    """Return the line that counts what the table leaves out."""
    left = Counter(layer.mechanism for layer in report.layers if layer.verdict == "none")
    if not left:
        return None
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(left.items()))
    total = left.total()
    return f"{total} layer{'s' if total != 1 else ''} without competition not shown: {kinds} (--all shows them)"


def closing(report: Report) -> list[str]:
    """Return the closing sentences: what was found, on what probe, and how far that goes."""
    s = report.summary
    rows = s.em + s.soft + s.hard
    if not report.layers:
        advice = next((f"To do: {f.help}." for f in report.findings if f.rule == "EM902" and f.help), None)
        return ["Nothing was classified: this audit is inconclusive.", *([advice] if advice else [])]
    lines = [_structure_line(report, rows), _dead_line(report)]
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


def _dead_line(report: Report) -> str:
    s, probe = report.summary, report.probe
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
