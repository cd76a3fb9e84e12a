"""EM2xx: how responsibility is spread."""

from __future__ import annotations

import math
from collections.abc import Iterator

from emscan.report.document import Components, Layer, Report, Responsibility, Thresholds
from emscan.rules.registry import Hit, rule
from emscan.rules.words import indicative, listed, noun

_LEVEL = 0.9  # effective components at or above this share of K: the load looks balanced
_SATURATED = 0.99  # share of values of a two-way layer
_DECIDED = 0.99  # share of the competitions of a softmax
_UNIFORM = "uniform responsibilities have perfect load and say nothing: add volume control or lower the temperature"
_COPIES = "decorrelate the scores, start the copies anew, or merge them"
_SAME = "check the scale of the layer's input and of its weights, and whether the probe varies at all"


def _depends(layer: Layer) -> bool:
    """Whether a row has persistent alternatives whose responsibilities an input could change."""
    found = layer.alternatives
    return layer.verdict == "em" and found is not None and found.persistent and found.kind != "prior"


@rule("EM201", "uninformative-posterior", "warning")
def uninformative_posterior(report: Report) -> Iterator[Hit]:
    """The responsibilities hardly depend on the input.

    What it finds: persistent alternatives whose mutual information with the input, H(mean r) - mean H(r), is below 1 %
    of ln K; and collapse, where the variance of every component's score is below 0.01. Mixing weights that no input
    reaches, and probes of a single competition, are left out: there it is so by construction.

    Why it matters: load alone does not show it. Responsibilities that are uniform for every input give every
    component its fair share of the load, look perfectly balanced, and say nothing. Nor does it show a layer that gives
    every input the same few components.

    What to do: volume control (variance and decorrelation penalties, as in VICReg) where an objective like -log Z is
    trained alone: nothing else in it keeps components apart;
    otherwise a look at the temperature, at the scale of the layer's input, and at whether training has started at all.
    """
    limits = report.thresholds
    for layer in report.layers:
        spread, parts = layer.responsibility, layer.components
        if spread is None or spread.information is None or not _depends(layer) or spread.competitions < 2:
            continue
        count = layer.alternatives.count if layer.alternatives is not None else None
        if not count or count < 2:
            continue
        variance = parts.variance if parts is not None else None
        flat = bool(variance) and all(v is not None and v < limits.collapse_variance for v in variance or ())
        if spread.information >= limits.information * math.log(count) and not flat:
            continue
        whole = parts.count if parts is not None else count
        effective = spread.effective_components or 0.0
        level = effective >= _LEVEL * whole
        collapsed = f"; every component's score varies by less than {limits.collapse_variance:g}" if flat else ""
        load = "the load looks fine" if level else "every input gets the same components"
        yield Hit(
            f"layer {layer.name}: input and component share {spread.information:.2g} nats of {math.log(count):.3g}{collapsed} "
            f"({load}: {effective:.1f} effective of {whole}){indicative(report)}",
            layer,
            help=_UNIFORM if level else _SAME,
        )


@rule("EM202", "unbalanced-router", "note")
def unbalanced_router(report: Report) -> Iterator[Hit]:
    """A router gives one expert several times its share.

    What it finds: a router whose busiest expert gets more than twice the uniform share 1/K of the assignments, all
    choices counted (`max_violation` above 1). Relative to 1/K, so 8 and 256 experts are judged alike.

    Why it matters: the busiest expert sets the time of a step, and overflows first where capacity is limited.

    What to do: a load-balancing loss (its weight trades balance against the task), or a bias on the scores that only the
    choice sees, which leaves the gradient of the task alone.
    """
    for layer in report.layers:
        spread = layer.responsibility
        if spread is not None and spread.max_violation is not None and spread.max_violation > 1:
            yield Hit(
                f"layer {layer.name}: the busiest expert gets {spread.max_violation + 1:.1f} times the uniform share"
                f"{_of_experts(layer)}{indicative(report)}",
                layer,
                help="a load-balancing loss or a bias on the scores evens it out",
            )


def _of_experts(layer: Layer) -> str:
    """Return the uniform share of a router's assignments and how many experts do the work."""
    count = layer.alternatives.count if layer.alternatives is not None else None
    effective = layer.responsibility.effective_components if layer.responsibility is not None else None
    if not count or effective is None:
        return ""
    return f" of 1/{count} ({effective:.1f} effective of {count})"


@rule("EM206", "dropped-assignments", "note")
def dropped_assignments(report: Report) -> Iterator[Hit]:
    """A router leaves assignments out because experts are full.

    What it finds: a router whose experts take a limited number of assignments, where some were beyond it on this probe
    (`dropped`: their share of all assignments). The load counts them: it is of what the router chose.

    Why it matters: what is left out gets no expert's output and gives the expert no gradient; how much depends on how
    many tokens are in a batch together, so the same token can come out differently.

    What to do: a larger capacity in evaluation, or a better balance of the load.
    """
    for layer in report.layers:
        share = layer.responsibility.dropped if layer.responsibility is not None else None
        if share:
            yield Hit(
                f"layer {layer.name}: {share:.1%} of the assignments find their expert full and are left out"
                f"{indicative(report)}",
                layer,
                help="a larger capacity, or a load-balancing loss or bias",
            )


@rule("EM203", "saturated-units", "note")
def saturated_units(report: Report) -> Iterator[Hit]:
    """Two-way units sit on one side on every value.

    What it finds: units of a sigmoid, tanh or like layer whose responsibility is at least 0.99 for the same side on
    every value of the probe (`frozen`); or a whole layer of which at least 99 % of values are that far to a side.

    Why it matters: they pass little gradient (r (1 - r) is below 0.01) and act as constants or as wires.

    What to do: smaller weights or normalization before the layer; a frozen forget gate can be what was learned.
    """
    for layer in report.layers:
        parts = layer.components
        if parts is not None and parts.frozen:
            yield Hit(
                f"layer {layer.name}: {len(parts.frozen)} of {parts.count} units stay on one side on every value "
                f"({listed(parts.frozen)})",
                layer,
                tuple(parts.frozen),
                "smaller weights or normalization before the layer, if they should still learn",
            )
            continue
        share = layer.responsibility.saturated if layer.responsibility is not None else None
        if share is not None and share >= _SATURATED:
            yield Hit(
                f"layer {layer.name}: {share:.1%} of values have r of {report.thresholds.saturated:g} or more for one side",
                layer,
                help="smaller weights or normalization before the layer, if it should still learn",
            )


@rule("EM204", "hard-softmax", "note")
def hard_softmax(report: Report) -> Iterator[Hit]:
    """Nearly every competition of a softmax is decided outright.

    What it finds: softmax rows inside the network (not the classes of the output, nor heads of attention, which have
    a rule of their own) in which more than 99 % of competitions give one alternative at least 0.99.

    Why it matters: this is close to the zero-temperature limit, where the losers get next to no gradient.

    What to do: a higher temperature, if the losers should still learn.
    """
    for layer in report.layers:
        spread = layer.responsibility
        inner = layer.alternatives is not None and layer.alternatives.kind != "classes"
        if layer.mechanism != "softmax" or not inner or spread is None or spread.hard_fraction is None or spread.heads:
            continue
        if spread.hard_fraction > _DECIDED:
            yield Hit(
                f"layer {layer.name}: {spread.hard_fraction:.1%} of competitions give one alternative "
                f"{report.thresholds.hard:g} or more",
                layer,
                help="a higher temperature lets the losers learn",
            )


@rule("EM205", "redundant-components", "note")
def redundant_components(report: Report) -> Iterator[Hit]:
    """Components say the same: their scores move together over the inputs.

    What it finds: copies among persistent alternatives, whose scores differ by a constant (the variance of the
    difference is below 0.01, and below a tenth of what it is for other pairs), so that the ratio of their
    responsibilities is the same for every input; and three or more alternatives whose squared correlations reach 75 %
    of what they could be, both as they are (`redundancy`) and less the mean of all scores of a competition
    (`redundancy_centred`): what is added to all scores alike does not change the posterior. Two alternatives whose
    scores are opposite are one decision, and no copies.

    Why it matters: load alone does not show it. Two copies of a component divide its responsibilities between them,
    so both carry load, neither is dead or starved, and yet the layer tells fewer things apart than it has components.

    What to do: a decorrelation penalty, or another start for the copies; or merge them: one component with the sum of
    their weights exp(-E) gives the same posterior.
    """
    limits = report.thresholds
    for layer in report.layers:
        parts, spread = layer.components, layer.responsibility
        if (
            parts is None
            or spread is None
            or not _depends(layer)
            or parts.redundancy is None
            or spread.competitions < 2
        ):
            continue
        if parts.copies:
            extra = sum(len(group) - 1 for group in parts.copies)
            groups = ", ".join(" = ".join(str(k) for k in group[:4]) for group in parts.copies[:3])
            more = ", ..." if len(parts.copies) > 3 or any(len(group) > 4 for group in parts.copies[:3]) else ""
            yield Hit(
                f"layer {layer.name}: {extra} of {parts.count} {noun(parts.kind, parts.count)} copy another one "
                f"({groups}{more}); they share its load{indicative(report)}",
                layer,
                tuple(k for group in parts.copies for k in group[1:]),
                _COPIES,
            )
        elif _redundant(parts, spread, limits) and (layer.alternatives is None or (layer.alternatives.count or 0) > 2):
            own = parts.redundancy_centred
            rest = f"{own:.0%} without what all scores share" if own is not None else "all scores are the same"
            yield Hit(
                f"layer {layer.name}: squared correlations of the {parts.count} {noun(parts.kind, parts.count)} reach "
                f"{parts.redundancy:.0%} of what they could be ({rest}); the load does not show it{indicative(report)}",
                layer,
                help=_COPIES,
            )


def _redundant(parts: Components, spread: Responsibility, limits: Thresholds) -> bool:
    """Whether scores say the same, with and without what is added to all of them alike."""
    if parts.redundancy is None or parts.redundancy < limits.redundancy:
        return False
    if parts.redundancy_centred is not None:
        return parts.redundancy_centred >= limits.redundancy
    # nothing is left, or nothing that rounding has spared: the responsibilities tell
    return (spread.information or 0.0) < limits.information * math.log(max(2, parts.count))
