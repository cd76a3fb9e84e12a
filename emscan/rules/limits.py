"""EM5xx: limits that a policy sets, and what of a report is measured against them. Without a policy none of them fires."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from emscan.report.document import Components, Layer, Limit, Report
from emscan.rules.registry import Hit, rule
from emscan.rules.words import indicative, listed, noun

_DEAD = "lower the learning rate, re-initialize the rows or prune them; if the number is meant, raise the limit"
_BALANCE = "a load-balancing loss or a bias on the scores; if the number is meant, raise the limit"
_LAYERS = 5  # that the message about a whole model names
_DRIFT = "compare with the checkpoint before; if the number is meant, move the limit"


@dataclass(frozen=True)
class Reading:
    """What a row shows: ``value``, and ``whole``, what a share of 100 % would be; the components that it counts."""

    value: float
    whole: float
    components: tuple[int, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Measure:
    """A limit that a policy can set on every row: ``most`` (or else least) of a number.

    ``counts``: the number is one of components, and whole. ``decides``: rules that say the same without a limit; where
    there is a limit for the row it alone decides. ``unit`` follows the number.
    """

    name: str
    code: str
    asks: str  # what the limit is, for help
    what: str  # what the number is, for messages
    read: Callable[[Layer], Reading | None]
    most: bool = True
    counts: bool = False
    shares: bool = True
    unit: str = ""
    decides: tuple[str, ...] = ()


def _counted(*lists: str) -> Callable[[Layer], Reading | None]:
    """Read how many components are in any of these lists."""

    def read(layer: Layer) -> Reading | None:
        parts = layer.components
        if parts is None or not parts.count or not _applies(parts, lists[0]):
            return None
        found = sorted({index for name in lists for index in getattr(parts, name)})
        return Reading(len(found), parts.count, tuple(found), noun(parts.kind, parts.count))

    return read


def _applies(parts: Components, name: str) -> bool:
    """Whether a list could hold anything: only units are rare or dormant, only what has a load is starved."""
    if name in {"rare", "dormant", "frozen"}:
        return parts.kind == "units"
    return name != "starved" or parts.kind != "units"


def _spread(name: str, whole: Callable[[Layer], float | None]) -> Callable[[Layer], Reading | None]:
    """Read a number of the responsibilities."""

    def read(layer: Layer) -> Reading | None:
        spread = layer.responsibility
        value = getattr(spread, name) if spread is not None else None
        full = whole(layer) if spread is not None else None
        return None if value is None or not full else Reading(value, full)

    return read


def _one(_: Layer) -> float:
    return 1.0


def _number(layer: Layer) -> float | None:
    if layer.components is not None and layer.components.count:
        return layer.components.count
    return layer.alternatives.count if layer.alternatives is not None else None


def _log_number(layer: Layer) -> float | None:
    """ln K, the most that information can be."""
    count = layer.alternatives.count if layer.alternatives is not None else None
    return math.log(count) if count and count > 1 else None


def _entropy(layer: Layer) -> Reading | None:
    """Mean H(r), and what it would be if every competition were uniform over the alternatives that it sees."""
    spread = layer.responsibility
    if spread is None or spread.entropy.mean is None or not spread.normalized_entropy:
        return Reading(0.0, 1.0) if spread is not None and spread.entropy.mean == 0 else None
    return Reading(spread.entropy.mean, spread.entropy.mean / spread.normalized_entropy)


def _redundancy(layer: Layer) -> Reading | None:
    value = layer.components.redundancy if layer.components is not None else None
    return Reading(value, 1.0) if value is not None else None


def _calibration(layer: Layer) -> Reading | None:
    found = layer.responsibility.calibration if layer.responsibility is not None else None
    return Reading(found.error, 1.0) if found is not None and found.error is not None else None


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            "max-dead",
            "EM501",
            "Most dead components of a layer.",
            "dead",
            _counted("dead", "provably_dead"),
            counts=True,
            decides=("EM101", "EM102", "EM103", "EM104", "EM105"),
        ),
        Measure(
            "max-starved",
            "EM502",
            "Most starved components of a layer.",
            "starved",
            _counted("starved"),
            counts=True,
            decides=("EM106",),
        ),
        Measure(
            "min-information",
            "EM503",
            "Least information of a layer, in nats or as a share of ln K.",
            "information",
            _spread("information", _log_number),
            most=False,
            unit="nats",
            decides=("EM201",),
        ),
        Measure(
            "max-violation",
            "EM504",
            "Largest max_violation of a router.",
            "max_violation",
            _spread("max_violation", _one),
            shares=False,
            decides=("EM202",),
        ),
        Measure(
            "min-entropy",
            "EM505",
            "Least mean entropy of a layer, in nats or as a share of what it can be.",
            "mean entropy",
            _entropy,
            most=False,
            unit="nats",
        ),
        Measure(
            "min-effective-components",
            "EM506",
            "Least effective components of a layer, a number or a share of K.",
            "effective components",
            _spread("effective_components", _number),
            most=False,
        ),
        Measure(
            "max-dormant",
            "EM507",
            "Most dormant units of a layer.",
            "dormant",
            _counted("dormant"),
            counts=True,
            decides=("EM108",),
        ),
        Measure(
            "max-rare",
            "EM508",
            "Most rare units of a layer.",
            "rare",
            _counted("rare"),
            counts=True,
            decides=("EM107",),
        ),
        Measure(
            "max-frozen",
            "EM509",
            "Most units of a layer that stay on one side.",
            "on one side on every value",
            _counted("frozen"),
            counts=True,
        ),
        Measure(
            "max-saturated",
            "EM510",
            "Largest share of saturated values of a layer.",
            "share of saturated values",
            _spread("saturated", _one),
            decides=("EM203",),
        ),
        Measure(
            "max-hard-fraction",
            "EM511",
            "Largest share of hard competitions of a layer.",
            "share of hard competitions",
            _spread("hard_fraction", _one),
            decides=("EM204",),
        ),
        Measure(
            "max-redundancy",
            "EM512",
            "Largest redundancy of a layer's components.",
            "redundancy",
            _redundancy,
            decides=("EM205",),
        ),
        Measure(
            "max-dropped",
            "EM513",
            "Largest share of assignments that a router drops.",
            "share of dropped assignments",
            _spread("dropped", _one),
            decides=("EM206",),
        ),
        Measure(
            "max-calibration-error",
            "EM514",
            "Largest expected calibration error of the output.",
            "expected calibration error",
            _calibration,
            decides=("EM211",),
        ),
    )
}
# Limits on the sum over all rows: name -> the limit of a row that counts the same.
TOTALS = {f"{name}-model": name for name in ("max-dead", "max-starved", "max-dormant")}


def limit_for(limits: Sequence[Limit], name: str, layer: Layer) -> Limit | None:
    """Return the limit that holds for a row: the last one for it, None where that is none."""
    for limit in reversed(limits):
        if limit.name == name and (limit.layers is None or any(matches(p, layer.name) for p in limit.layers)):
            return limit if limit.value is not None else None
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a row's name is, or as a glob matches, a pattern."""
    return pattern == name or fnmatchcase(name, pattern)


def described(limit: Limit) -> str:
    """Return a limit as a policy states it: "max-dead = 5%"."""
    return f"{limit.name} = {quantity(limit)}"


def quantity(limit: Limit) -> str:
    """Return the value of a limit as a policy states it."""
    if limit.value is None:
        return "off"
    return f"{100 * limit.value:.10g}%" if limit.share else f"{limit.value:.10g}"


def _kept(measure: Measure, limit: Limit, reading: Reading) -> bool:
    """Whether a number is within its limit."""
    bound = (limit.value or 0.0) * (reading.whole if limit.share else 1.0)
    slack = 1e-9 * max(1.0, abs(bound))  # what rounding does to a share
    return reading.value <= bound + slack if measure.most else reading.value >= bound - slack


def _beyond(report: Report, name: str, advice: str) -> Iterator[Hit]:
    """Yield the rows that are not within a limit."""
    measure, limits = MEASURES[name], report.policy.limits if report.policy is not None else []
    for layer in report.layers if limits else ():
        limit, reading = limit_for(limits, name, layer), measure.read(layer)
        if limit is not None and reading is not None and not _kept(measure, limit, reading):
            found = f"layer {layer.name}: {_said(measure, limit, reading)}{indicative(report)}"
            yield Hit(found, layer, reading.components, advice)
    for total, one in TOTALS.items():
        if one == name and limits:
            yield from _beyond_in_all(report, total, measure, limits, advice)


def _beyond_in_all(
    report: Report, name: str, measure: Measure, limits: Sequence[Limit], advice: str
) -> Iterator[Hit]:  # fmt: skip
    limit = next((one for one in reversed(limits) if one.name == name), None)
    found = [(layer.name, reading) for layer in report.layers if (reading := measure.read(layer)) is not None]
    readings = [reading for _, reading in found]
    if limit is None or limit.value is None or not readings:
        return
    reading = Reading(sum(r.value for r in readings), sum(r.whole for r in readings), (), "components")
    if not _kept(measure, limit, reading):
        most = sorted(((r.value, row) for row, r in found if r.value), reverse=True)
        where = ", ".join(f"{value:g} in {row}" for value, row in most[:_LAYERS])
        more = f", +{len(most) - _LAYERS} more layers" if len(most) > _LAYERS else ""
        said = f"model: {_said(measure, limit, reading)} ({where}{more}){indicative(report)}"
        yield Hit(said, help=advice, subject=name)


def _said(measure: Measure, limit: Limit, reading: Reading) -> str:
    verb = "allows" if measure.most else "asks for"
    wants = f"{limit.name} {verb} {quantity(limit)}"
    if measure.counts:
        share = f"{100 * reading.value / reading.whole:.3g}%"
        which = f" ({listed(reading.components)})" if reading.components else ""
        return f"{reading.value:g} of {reading.whole:g} {reading.kind} are {measure.what}, {share}; {wants}{which}"
    unit = f" {measure.unit}" if measure.unit else ""
    share = f" ({100 * reading.value / reading.whole:.3g}%)" if limit.share else ""
    return f"{measure.what} is {reading.value:.3g}{unit}{share}; {wants}"


@rule("EM501", "max-dead", "error")
def max_dead(report: Report) -> Iterator[Hit]:
    """More components are dead than the policy allows.

    What it finds: rows in which the components that are dead on the probe, or dead on every input, are more than
    `max-dead` (a count, or a share of the row's components); with `max-dead-model`, the same over all rows.

    Why it matters: dead components get no gradient on these inputs; a number that grows from checkpoint to checkpoint
    is capacity that training has lost.

    What to do: see EM101 for units and EM105 for experts, codes and latents. If the number is meant, raise the limit, for
    this layer alone where it can be. Where the limit is set it decides in place of EM101 to EM105.
    """
    yield from _beyond(report, "max-dead", _DEAD)


@rule("EM502", "max-starved", "error")
def max_starved(report: Report) -> Iterator[Hit]:
    """More components are starved than the policy allows.

    What it finds: rows with more classes, prototypes, experts or codes below the threshold `starved` than `max-starved`
    (a count, or a share of the row's components); with `max-starved-model`, the same over all rows.

    Why it matters: responsibility is the weight of their gradient: what carries none hardly learns.

    What to do: see EM106: the balance of the probe first, then temperature and load balancing. Where the limit is set it
    decides in place of EM106.
    """
    yield from _beyond(report, "max-starved", _BALANCE)


@rule("EM503", "min-information", "error")
def min_information(report: Report) -> Iterator[Hit]:
    """Input and component share less information than the policy asks for.

    What it finds: rows with persistent alternatives whose `information`, H(mean r) - mean H(r), is below
    `min-information` (in nats, or a share of ln K).

    Why it matters: near 0 the responsibilities do not depend on the input, however balanced the load looks.

    What to do: see EM201: temperature, scale of the input, volume control. Where the limit is set it decides in place of
    EM201.
    """
    yield from _beyond(report, "min-information", _DRIFT)


@rule("EM504", "max-violation", "error")
def max_violation(report: Report) -> Iterator[Hit]:
    """A router is less balanced than the policy allows.

    What it finds: routers whose `max_violation`, the busiest expert's load over the uniform share 1/K less one, is above
    `max-violation` (a number: 1 is twice the uniform share).

    Why it matters: the busiest expert sets the time of a step and overflows first.

    What to do: see EM202: a load-balancing loss or a bias on the scores. Where the limit is set it decides in place of
    EM202.
    """
    yield from _beyond(report, "max-violation", _BALANCE)


@rule("EM505", "min-entropy", "error")
def min_entropy(report: Report) -> Iterator[Hit]:
    """Responsibilities are more decided than the policy allows.

    What it finds: rows whose mean H(r) is below `min-entropy` (in nats, or a share of what uniform responsibilities would
    have). Attention counts as a whole, over its heads.

    Why it matters: entropy near 0 is the hard limit, where the losers get next to no gradient.

    What to do: a higher temperature, normalization of queries and keys, or a lower learning rate.
    """
    yield from _beyond(report, "min-entropy", _DRIFT)


@rule("EM506", "min-effective-components", "error")
def min_effective_components(report: Report) -> Iterator[Hit]:
    """Fewer components do the work than the policy asks for.

    What it finds: rows whose `effective_components`, exp H(load), is below `min-effective-components` (a number, or a
    share of K).

    Why it matters: of a codebook this is its perplexity, of a router the experts that do the work.

    What to do: load balancing; re-initialization of what is unused from what is used.
    """
    yield from _beyond(report, "min-effective-components", _BALANCE)


@rule("EM507", "max-dormant", "error")
def max_dormant(report: Report) -> Iterator[Hit]:
    """More units are dormant than the policy allows.

    What it finds: rows with more units below the threshold `dormant` than `max-dormant` (a count, or a share); with
    `max-dormant-model`, the same over all rows.

    Why it matters: a growing share of dormant units goes with lost plasticity.

    What to do: re-initializing dormant units during training is a known remedy (EM108).
    """
    yield from _beyond(report, "max-dormant", _DRIFT)


@rule("EM508", "max-rare", "error")
def max_rare(report: Report) -> Iterator[Hit]:
    """More units are rarely on than the policy allows.

    What it finds: rows with more units below the threshold `rare` than `max-rare` (a count, or a share).

    Why it matters: they learn from few samples, and are the next to die.

    What to do: watch them over checkpoints; a lower learning rate if they die (EM107).
    """
    yield from _beyond(report, "max-rare", _DRIFT)


@rule("EM509", "max-frozen", "error")
def max_frozen(report: Report) -> Iterator[Hit]:
    """More two-way units stay on one side than the policy allows.

    What it finds: rows with more `frozen` units than `max-frozen` (a count, or a share).

    Why it matters: they pass little gradient and act as constants.

    What to do: smaller weights or normalization before the layer (EM203).
    """
    yield from _beyond(report, "max-frozen", _DRIFT)


@rule("EM510", "max-saturated", "error")
def max_saturated(report: Report) -> Iterator[Hit]:
    """More values of a two-way layer are saturated than the policy allows.

    What it finds: rows whose share of `saturated` values is above `max-saturated`.

    Why it matters: the gradient of a saturated value is below 0.01.

    What to do: smaller weights or normalization before the layer. Where the limit is set it decides in place of EM203.
    """
    yield from _beyond(report, "max-saturated", _DRIFT)


@rule("EM511", "max-hard-fraction", "error")
def max_hard_fraction(report: Report) -> Iterator[Hit]:
    """More competitions are decided outright than the policy allows.

    What it finds: rows whose `hard_fraction`, the share of competitions with max r at or above the threshold `hard`, is
    above `max-hard-fraction`.

    Why it matters: the losers of a hard competition get next to no gradient.

    What to do: a higher temperature. Where the limit is set it decides in place of EM204.
    """
    yield from _beyond(report, "max-hard-fraction", _DRIFT)


@rule("EM512", "max-redundancy", "error")
def max_redundancy(report: Report) -> Iterator[Hit]:
    """Components say the same more than the policy allows.

    What it finds: rows whose `redundancy`, squared correlations of the scores over what they could be, is above
    `max-redundancy`.

    Why it matters: load does not show it; the layer tells fewer things apart than it has components.

    What to do: a decorrelation penalty, or merging what is alike. Where the limit is set it decides in place of EM205.
    """
    yield from _beyond(report, "max-redundancy", _DRIFT)


@rule("EM513", "max-dropped", "error")
def max_dropped(report: Report) -> Iterator[Hit]:
    """A router leaves out more assignments than the policy allows.

    What it finds: routers whose share of assignments beyond their experts' capacity is above `max-dropped`.

    Why it matters: what is left out gets no expert's output.

    What to do: a larger capacity, or a better balance. Where the limit is set it decides in place of EM206.
    """
    yield from _beyond(report, "max-dropped", _BALANCE)


@rule("EM514", "max-calibration-error", "error")
def max_calibration_error(report: Report) -> Iterator[Hit]:
    """The output is further from its targets' frequencies than the policy allows.

    What it finds: output rows with targets whose expected calibration error is above `max-calibration-error`.

    Why it matters: their responsibilities are no probabilities of being right.

    What to do: temperature scaling on held-out data. Where the limit is set it decides in place of EM211.
    """
    yield from _beyond(report, "max-calibration-error", "temperature scaling on held-out data")
