"""A site: one competition or gate, as found in the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from emscan.report.document import AlternativeKind, Mechanism, Statistic, Verdict
from emscan.trace.graph import Call, Value


@dataclass
class GateForm:
    """A unit's gate as a function of its energy z.

    ``log_odds``: u(z) with r_on = sigmoid(u), for two-way rows. ``on_above``: the upper side is z > on_above.
    ``mirror``: z' with u(z') = -u(z). ``flat``: closed intervals where the derivative is exactly 0, with
    the constant output on each in ``stuck``.
    """

    label: str
    function: Callable[[Tensor], Tensor]
    statistic: Statistic = "gate"
    log_odds: Callable[[Tensor], Tensor] | None = None
    mirror: Callable[[Tensor], Tensor] | None = None
    ends: tuple[float, float] = (0.0, 1.0)  # what the gate's value (or slope) goes to on the off and the on side
    on_above: float = 0.0
    flat: tuple[tuple[float, float], ...] = ()
    stuck: tuple[float, ...] = ()
    output_tells: bool = False  # on exactly where the output is above 0
    scalar: bool = True  # the same for every unit; False where a parameter sets the threshold unit by unit
    half: int | None = None  # the axis whose second half holds the energies (GLU)
    note: str | None = None


@dataclass(eq=False)
class Choice:
    """What a router has chosen: indices of experts, or a mask that has them along ``axis``.

    ``kept``: how many of a ranking's entries along ``axis`` count, None: all. ``labels``: the experts that the scores
    stand for, where the model has computed which these are; ``place``: then what was chosen, among the scores.
    """

    value: Value
    axis: int = -1
    kept: int | None = None
    mask: bool = False
    inverted: bool = False  # the mask is of those that are left out
    whole: bool = False  # has an axis of its own for the k choices of a competition, in the place of the scores'
    labels: Value | None = None
    place: Value | None = None


@dataclass(eq=False)
class Cut:
    """Where assignments are left out: entries that are not zero in ``before`` and in ``after``.

    ``keeps``: both are one comparison, whose true entries are kept (or left out, where False).
    """

    before: Value
    after: Value
    keeps: bool | None = None


@dataclass(eq=False)
class Posterior:
    """Scores of all experts along ``axis``, and what makes them a posterior: ``form`` "shares" (of their own sum),
    "softmax" or "sigmoid" (then shares), or "untold". ``labels``: the expert of every
    score, where that changes with the input."""

    value: Value
    form: str
    axis: int
    labels: Value | None = None


@dataclass(eq=False)
class Site:
    """One competition or gate.

    ``energies`` are scores s with r proportional to exp(s) (softmax), or what the gate is a function of; ``axis``
    (negative) is the axis of the alternatives there. ``emitted`` is what the model's own operators handed out.
    """

    verdict: Verdict
    mechanism: Mechanism
    label: str
    members: set[Call]
    energies: Value
    emitted: Value
    statistic: Statistic
    count: int | None
    kind: AlternativeKind
    axes: tuple[int, ...] = (-1,)
    persistent: bool = False
    leaky: bool | None = None
    form: GateForm | None = None
    op: str = ""
    attention: Call | None = None
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    differentiable: bool = True
    weights: Value | None = None  # what is divided by its own sum, where that was written by hand
    weights_axes: tuple[int, ...] = ()
    denominator: Value | None = None
    segments: Call | None = None  # the scatter that adds weights up by index, where alternatives are grouped so
    guarded: bool = False  # a small constant or a clamp keeps the division safe
    sink: bool = False  # a constant of the sum's own size: one more alternative, of fixed energy
    learned_sink: bool = False  # the energy of that alternative is a parameter
    sink_weight: float = 0.0  # exp(-E) of that alternative, where it is a number
    terms: list[Value] = field(default_factory=list)  # alternatives that stand in separate values
    numerator: Value | None = None  # of a mean whose numerator and denominator are accumulated apart,
    values: list[Value] = field(default_factory=list)  # what it is a mean of,
    mixed: list[Call] = field(default_factory=list)  # and the calls that mix these under the weights
    sign: float = 1.0  # r is proportional to exp(sign * energies)
    soft: Value | None = None  # the posterior before a truncation
    winner: Value | None = None  # the mask of the entries that equal their maximum, where that is how one is chosen
    chosen: Value | None = None  # indices of the winners: routers, codes, classes
    order: Value | None = None  # the component at every place, where the scores are ranked and none is left out
    kept: int | None = None  # how many a ranking keeps; what it hands out beyond is not used
    inverted: bool = False  # ``winner`` is the mask of all others
    choices: list[Choice] = field(default_factory=list)  # a router's, all of them
    cuts: list[Cut] = field(default_factory=list)  # where an expert's capacity leaves assignments out
    posterior: Posterior | None = None  # a router's, over all experts
    owner: Call | None = None
    owner_names: tuple[str, ...] = ()
    region: list[Call] = field(default_factory=list)  # energies -> emitted, for replay

    @property
    def first(self) -> int:
        """Where the site begins in the run."""
        return min((call.id for call in self.members), default=0)
