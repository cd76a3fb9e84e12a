"""EM1xx: components that get no gradient, or hardly any use."""

from __future__ import annotations

from collections.abc import Iterator

from emscan.report.document import Components, Layer, Report
from emscan.rules.registry import Hit, rule
from emscan.rules.words import indicative, listed, noun, on_probe

_ENOUGH = 10  # competitions for each expert below which the message says how few there were
_REVIVE = "on these inputs no gradient revives them: lower the learning rate, re-initialize the rows, or prune them"


def _rows(report: Report) -> Iterator[tuple[Layer, Components]]:
    for layer in report.layers:
        if layer.components is not None:
            yield layer, layer.components


@rule("EM101", "dead-unit", "warning")
def dead_unit(report: Report) -> Iterator[Hit]:
    """Units of a gate get no gradient on any value of the probe.

    What it finds: units of a hard gate whose derivative is exactly 0 on every value: a ReLU that is never above 0, a
    clipped unit that is always at its bound (the report gives the bound as `stuck_at`).

    Why it matters: a zero gate gives a zero gradient to the unit's own weights. On these inputs nothing but a change
    upstream, weight decay or normalization can bring it back; it costs compute and gives nothing, or a constant.

    What to do: a lower learning rate, or a warm-up, keeps further units from dying; it does not bring these back.
    Re-initializing their rows (incoming weights drawn anew, outgoing ones set to 0, so that the outputs stay) does, and is
    known to help where training goes on (ReDo, Sokar et al. 2023). For use as it is: `emscan audit MODEL --prune-file FILE`
    writes masks for torch.nn.utils.prune, checked to leave the outputs on the probe as they are. The statement is about
    this probe: the bound in the report says how often a unit could still fire on inputs like these.
    """
    for layer, parts in _rows(report):
        if parts.kind == "units" and parts.dead and not parts.numeric and len(parts.dead) < parts.count:
            count = len(parts.dead)
            yield Hit(
                f"layer {layer.name}: {count} of {parts.count} units are dead {on_probe(report)} ({listed(parts.dead)})",
                layer,
                tuple(parts.dead),
                _REVIVE,
            )


@rule("EM102", "dead-layer", "error")
def dead_layer(report: Report) -> Iterator[Hit]:
    """Every unit of a layer is dead: nothing passes.

    What it finds: a gated layer in which no unit has a derivative other than exactly 0 on any value of the probe.

    Why it matters: the layer hands on a constant, and no gradient reaches anything before it on this path.

    What to do: check the probe's range first: inputs that are not scaled as in training kill a layer by themselves. If
    it is sound, go back to a checkpoint in which the layer was alive and lower the learning rate from there: with no
    gradient, training on from here changes nothing before the layer on this path.
    """
    for layer, parts in _rows(report):
        if parts.kind == "units" and parts.count and len(parts.dead) == parts.count and not parts.numeric:
            yield Hit(
                f"layer {layer.name}: all {parts.count} units are dead {on_probe(report)}",
                layer,
                tuple(parts.dead),
                "check that the probe is scaled as the training data were, then the learning rate",
            )


@rule("EM103", "underflowed-unit", "warning")
def underflowed_unit(report: Report) -> Iterator[Hit]:
    """Units of a smooth gate get exactly zero gradient, by underflow.

    What it finds: units of a sigmoid, tanh, GELU or like gate that sit so far out on every value that the derivative
    is exactly 0 in the model's dtype.

    Why it matters: in exact arithmetic they would still learn; in this dtype they do not.

    What to do: smaller weights (decay, normalization) or a wider dtype for this layer.
    """
    for layer, parts in _rows(report):
        if parts.dead and parts.numeric:
            yield Hit(
                f"layer {layer.name}: {len(parts.dead)} of {parts.count} units get a gradient of exactly 0 by underflow "
                f"{on_probe(report)} ({listed(parts.dead)})",
                layer,
                tuple(parts.dead),
                "weight decay or normalization brings the energies back into range",
            )


@rule("EM104", "provably-dead-unit", "warning")
def provably_dead_unit(report: Report) -> Iterator[Hit]:
    """The weights alone prove that units can never switch on.

    What it finds: units for which interval arithmetic over the range that reaches the layer (nonnegative after ReLU,
    [-1, 1] after tanh, the simplex after softmax) shows an energy that never exceeds the threshold.

    Why it matters: unlike "dead on this probe", this holds for every input, in eval mode.

    What to do: prune the listed rows: the function of the network does not change beyond their constant. `emscan audit
    MODEL --prune-file FILE` writes the masks. If training goes on, re-initialize them instead.
    """
    for layer, parts in _rows(report):
        if parts.provably_dead:
            count = len(parts.provably_dead)
            yield Hit(
                f"layer {layer.name}: {count} of {parts.count} units are dead on every possible input "
                f"({listed(parts.provably_dead)})",
                layer,
                tuple(parts.provably_dead),
                "prune the listed rows",
            )


@rule("EM105", "dead-alternative", "warning")
def dead_alternative(report: Report) -> Iterator[Hit]:
    """Experts, codes or latents are never chosen.

    What it finds: alternatives of a router, a top-k or a selection that got responsibility exactly 0 on every sample,
    counting all k choices: an expert that is only ever a second choice is not among them. Experts that are always on,
    beside those that are chosen, are no alternatives. A probe of fewer tokens than experts says little; the message
    gives their number where it is below ten for each.

    Why it matters: what is never chosen gets no gradient and stays as it is; its parameters are carried for nothing.

    What to do: experts: a load-balancing loss, or a bias on the scores that is raised for what is used less; noise on the
    scores lets unused ones be tried. Codes: re-initialization from the data, or from a used code, is known to bring them
    into use; a lower codebook size if it does not. Latents of a sparse autoencoder: an auxiliary loss on what is dead,
    or re-sampling. None of these says which experts a model needs: dead ones can be left out for use as it is.
    """
    for layer, parts in _rows(report):
        if parts.kind not in {"units", "classes"} and parts.dead:
            yield Hit(
                f"layer {layer.name}: {len(parts.dead)} of {parts.count} {parts.kind} are never chosen {on_probe(report)} "
                f"({listed(parts.dead)}){_few(layer)}",
                layer,
                tuple(parts.dead),
                "a load-balancing loss, noise on the scores, or re-initialization from a used one",
            )


def _few(layer: Layer) -> str:
    """Return how many competitions there were where a router would leave experts out by chance."""
    seen = layer.responsibility.competitions if layer.responsibility is not None else 0
    parts = layer.components
    if parts is None or parts.kind != "experts" or not 0 < seen < _ENOUGH * parts.count:
        return ""
    return f"; {seen:,} competitions for {parts.count} experts"


@rule("EM106", "starved-alternative", "warning")
def starved_alternative(report: Report) -> Iterator[Hit]:
    """Alternatives carry next to no load.

    What it finds: classes, prototypes, experts or codes with less than 1 % of the uniform share 1/K (relative to K, so
    8 and 256 experts are judged alike).

    Why it matters: responsibility is the weight of their gradient; they hardly learn.

    What to do: look at the balance of the probe first (a class that is absent starves rightly). Then a load-balancing
    loss or bias (experts), a higher temperature early in training, or volume control (prototypes): what is starved has
    a small gradient, not none, so it can come back, slowly.
    """
    for layer, parts in _rows(report):
        if parts.starved:
            share = report.thresholds.starved / max(1, parts.count)
            yield Hit(
                f"layer {layer.name}: {len(parts.starved)} of {parts.count} {noun(parts.kind, parts.count)} carry less than "
                f"{share:.2g} of the load each, {100 * report.thresholds.starved:g} % of the uniform share "
                f"({listed(parts.starved)}){indicative(report)}",
                layer,
                tuple(parts.starved),
                "check whether the probe holds what they stand for, then temperature and load balancing",
            )


@rule("EM107", "rare-unit", "note")
def rare_unit(report: Report) -> Iterator[Hit]:
    """Units are on for less than 1 % of values.

    What it finds: units that do fire, but on fewer values than the threshold `rare`.

    Why it matters: they learn from few samples; in a sparse autoencoder that is the point, in a classifier often not.

    What to do: nothing by itself; watch whether they become dead over checkpoints.
    """
    for layer, parts in _rows(report):
        if parts.rare:
            share = report.thresholds.rare
            yield Hit(
                f"layer {layer.name}: {len(parts.rare)} of {parts.count} units are on for less than {share:.2%} of values "
                f"({listed(parts.rare)}){indicative(report)}",
                layer,
                tuple(parts.rare),
                "watch whether they die over the next checkpoints",
            )


@rule("EM108", "dormant-unit", "note")
def dormant_unit(report: Report) -> Iterator[Hit]:
    """Units give next to nothing compared with their layer.

    What it finds: units whose mean |h| is at most 2.5 % of the layer's mean, neither dead nor rare.

    Why it matters: they get gradient, but hardly take part; a growing share of them goes with lost plasticity.

    What to do: nothing by itself. Re-initializing dormant units now and then during training (ReDo, Sokar et al. 2023)
    is known to help in reinforcement learning; elsewhere less is known.
    """
    for layer, parts in _rows(report):
        if parts.dormant:
            yield Hit(
                f"layer {layer.name}: {len(parts.dormant)} of {parts.count} units have a mean output of at most "
                f"{report.thresholds.dormant:.1%} of the layer's ({listed(parts.dormant)}){indicative(report)}",
                layer,
                tuple(parts.dormant),
                "watch the share over checkpoints",
            )
