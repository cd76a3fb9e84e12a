"""The report as data: what `--format json` writes and `emscan.audit` returns. No torch here.

Field names are the contract of schema version 1. A number that does not apply or is not finite is None.
Entropies are in nats. Indices of components are rows of the owner's weight.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Verdict = Literal["em", "soft", "hard", "none"]
Mechanism = Literal[
    "softmax",
    "kernel",
    "logistic",
    "smooth-gate",
    "threshold",
    "selection",
    "truncation",
    "affine",
    "normalization",
    "pooling",
    "embedding",
    "elementwise",
]
Statistic = Literal["vector", "mean", "log-partition", "log", "gate", "mode", "top-k", "none"]
AlternativeKind = Literal[
    "classes",
    "prototypes",
    "experts",
    "codes",
    "latents",
    "keys",
    "positions",
    "window",
    "units",
    "sign",
    "on-off",
    "batch",
    "prior",
]
Level = Literal["error", "warning", "note"]
Status = Literal["ok", "inconclusive"]


@dataclass(frozen=True)
class Thresholds:
    """The named limits behind every list and finding; printed in the report, set by options."""

    rare: float = 0.01  # a unit on for less than this share of values is rare
    dormant: float = 0.025  # mean |h_i| at most this share of the layer's mean is dormant
    starved: float = 0.01  # load below this share of the uniform share 1/K is starved
    hard: float = 0.99  # a competition with max r at or above this is hard
    saturated: float = 0.99  # a two-way value with max(r, 1 - r) at or above this is saturated
    confidence: float = 0.95  # level of the upper bound on how often an unseen unit fires
    collapse_variance: float = 0.01  # component variance below this everywhere is collapse
    information: float = 0.01  # information below this share of ln K is "near 0"
    redundancy: float = 0.75  # correlation energy at or above this share of its maximum is redundant
    calibration: float = 0.1  # an expected calibration error above this is worth a note
    sink: float = 0.3  # a head with more mean mass than this on the first key is a sink
    collapsed_head: float = 0.05  # mean normalized entropy below this: a head looks at next to one key
    uniform_head: float = 0.99  # mean normalized entropy above this: a head looks at all keys alike
    inactive_head: float = 0.05  # output norm below this share of the mean over heads: a head gives nothing
    evidence: float = 16.0  # tolerance of sum_error and gradient_error, in epsilons of the dtype times sqrt(K)


@dataclass
class Alternatives:
    """What competes: ``count`` alternatives along ``axis`` (negative, from the last), tied to parameters if persistent."""

    kind: AlternativeKind
    count: int | None
    axis: int | None = None
    persistent: bool = False


@dataclass
class Conditions:
    """The three conditions of EM structure, each as found in the run."""

    hypotheses: bool = False
    soft_competition: bool = False
    posterior_propagated: bool = False


@dataclass
class Evidence:
    """What was verified numerically, from what the model's own operators emitted.

    ``sum_error``: largest |sum_j r_j - 1|. ``gradient_error``: largest |r_j + d log Z / d E_j| with the gradient
    by automatic differentiation in float64. ``tolerance`` scales with the epsilon of ``dtype``.
    ``differentiable`` is False where the posterior is detached or a straight-through estimator replaces it.
    """

    op: str
    source: str | None = None
    sum_error: float | None = None
    gradient_error: float | None = None
    tolerance: float | None = None
    dtype: str | None = None
    differentiable: bool | None = None


@dataclass
class Components:
    """Units or alternatives that are tied to parameters; every list holds indices or one number per index."""

    kind: str
    count: int
    dead: list[int] = field(default_factory=list)
    rare: list[int] = field(default_factory=list)
    dormant: list[int] = field(default_factory=list)
    linear: list[int] = field(default_factory=list)
    starved: list[int] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    provably_dead: list[int] = field(default_factory=list)
    numeric: bool = False
    stuck_at: list[float | None] | None = None  # one per entry of ``dead``
    on_rate: list[float | None] | None = None
    upper_bound: float | None = None
    load: list[float | None] | None = None
    soft_load: list[float | None] | None = None
    variance: list[float | None] | None = None
    redundancy: float | None = None  # correlation_energy over its maximum: K (K - 1) for each set of K components
    redundancy_centred: float | None = (
        None  # that of the scores less their mean in each competition; null: all equal it
    )
    correlation_energy: float | None = None  # sum of squared correlations between different components
    correlated: int | None = None  # competitions that the correlations are over, where not all of them
    mass: list[float | None] | None = None  # N_k, the sum of responsibilities
    copies: list[list[int]] | None = None  # groups whose scores move together: each has its share, all say the same
    gradient: list[float | None] | None = None


@dataclass
class EntropySummary:
    """Distribution of H(r) over all competitions, in nats; quantiles right to one of 4,096 bins on [0, ln K]."""

    mean: float | None = None
    min: float | None = None
    p05: float | None = None
    median: float | None = None
    p95: float | None = None
    max: float | None = None


@dataclass
class MaxSummary:
    """Mean and 95th percentile of max_k r_k over all competitions."""

    mean: float | None = None
    p95: float | None = None


@dataclass
class Temperature:
    """Mean normalized entropy with all energies halved and doubled: near a hard limit neither moves it much."""

    half: float | None = None
    double: float | None = None
    sampled: int | None = None  # number of competitions that they are over, where not all of them


@dataclass
class Calibration:
    """How right an output is about its targets; ``error``: expected calibration error over ``bins`` equal bins."""

    targets: int
    accuracy: float | None = None
    confidence: float | None = None
    error: float | None = None
    bins: int = 15


@dataclass
class Head:
    """One attention head. ``uniform_first_key``: the first key's mass if every query looked at all its keys alike."""

    normalized_entropy: float | None = None
    first_key: float | None = None
    diagonal: float | None = None
    hard_fraction: float | None = None
    output_norm: float | None = None
    uniform_first_key: float | None = None


@dataclass
class Responsibility:
    """How responsibility is spread, over every competition on the probe."""

    competitions: int
    entropy: EntropySummary = field(default_factory=EntropySummary)
    normalized_entropy: float | None = None
    effective_components: float | None = None  # exp H(load); of a codebook, its perplexity
    information: float | None = None
    max: MaxSummary = field(default_factory=MaxSummary)
    hard_fraction: float | None = None
    saturated: float | None = None
    max_violation: float | None = None
    load_entropy: float | None = None  # H(load), nats
    dropped: float | None = None  # share of a router's assignments that an expert's capacity left out
    temperature: Temperature | None = None
    calibration: Calibration | None = None
    mean: float | None = None  # mean r of the upper side, two-way rows only
    sampled: int | None = None  # number of sampled queries where not every competition was measured
    heads: list[Head] | None = None


@dataclass
class Layer:
    """One row: the parametrized operation that produces the values, with the competition or gate applied to them."""

    index: int
    name: str
    module: str | None
    composition: str
    verdict: Verdict
    em_compatible: bool | None
    mechanism: Mechanism
    leaky: bool | None = None
    statistic: Statistic = "none"
    calls: int = 1
    note: str | None = None
    flags: list[str] = field(default_factory=list)  # what rules go by: "double-normalization", "detached", ...
    alternatives: Alternatives | None = None
    conditions: Conditions = field(default_factory=Conditions)
    evidence: Evidence | None = None
    components: Components | None = None
    responsibility: Responsibility | None = None
    source: str | None = None  # file:line of the code that runs the competition or gate, where that is not torch's


@dataclass
class OpCount:
    """Calls of one competition-like operator; ``calls`` is the sum of the other four."""

    op: str
    calls: int
    in_rows: int = 0
    absorbed: int = 0
    control: int = 0
    unclassified: int = 0


@dataclass
class Unclassified:
    """An operator that emscan does not know, or could not place, on parameter-dependent floating-point values."""

    op: str
    where: str
    calls: int


@dataclass
class Coverage:
    """Where every competition-like operator call of the traced run went."""

    calls: list[OpCount] = field(default_factory=list)
    unclassified: list[Unclassified] = field(default_factory=list)


@dataclass
class Mismatch:
    """A tensor whose shape in the file is not that in the model."""

    name: str
    file: list[int]
    model: list[int]


@dataclass
class Misfit:
    """What of a file and its architecture did not fit (--partial): ``missing`` tensors keep what the model began with.

    ``loaded``: how many tensors came from the file; ``unexpected`` ones are the file's alone.
    """

    loaded: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)


@dataclass
class ModelInfo:
    """Where the model came from. ``path`` is as the user gave it; None for a live module."""

    path: str | None = None
    format: str = "module"
    sha256: str | None = None
    parameters: int = 0
    trusted: bool = False
    weights: bool = True  # False where there are none: only structure can be told, nothing is measured
    target: str | None = None  # the architecture that --model named
    arguments: dict[str, Any] = field(default_factory=dict)  # that --model-arg gave it
    partial: Misfit | None = None


@dataclass
class ProbeInfo:
    """What was run. ``source``: the SPEC, or how a synthetic one was made."""

    source: str
    synthetic: bool = False
    samples: int = 0
    batches: int = 0
    seed: int | None = None
    sha256: str | None = None
    partial: bool = False  # interrupted: the numbers are those of the batches that were done
    objective: str | None = None  # the objective in force, and why, e.g. "cross-entropy (integer targets in [0, 10))"


@dataclass
class Summary:
    """Counts over the rows. ``em_two_way`` counts logistic rows and is part of ``em``."""

    layers: int = 0
    em: int = 0
    em_two_way: int = 0
    soft: int = 0
    hard: int = 0
    none: int = 0
    components: int = 0
    dead: int = 0
    starved: int = 0
    findings: int = 0
    status: Status = "ok"


@dataclass
class Finding:
    """One statement that a rule makes about the report. ``layer`` is the row's name, ``layer_index`` its index."""

    rule: str
    level: Level
    message: str
    layer: str | None = None
    layer_index: int | None = None
    components: list[int] = field(default_factory=list)
    fingerprint: str = ""
    help: str = ""
    suppressed: str | None = None  # why it does not count: "ignore: ..." or "limit: ..." of a policy, or "baseline"


@dataclass
class Limit:
    """A limit of a policy, by its ``name`` there, e.g. max-dead; ``value`` None: none.

    ``share``: the value is a share, of a row's components or of what the rule's page says. ``layers``: globs of the rows
    that it is for, None for all; of several limits for a row the last one holds.
    """

    name: str
    value: float | None
    share: bool = False
    layers: list[str] | None = None


@dataclass
class PolicyInfo:
    """What `emscan check` judged the report by. ``source``: the file, None without one."""

    source: str | None = None
    select: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    fail_on: list[str] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)


@dataclass
class Rows:
    """Rows of a tensor along its first axis; ``rows`` are indices, of ``count``."""

    name: str
    count: int
    rows: list[int]


@dataclass
class Copies:
    """Rows of a tensor that equal each other bit for bit: groups of indices, of ``count``."""

    name: str
    count: int
    groups: list[list[int]]


@dataclass
class NotFinite:
    """Numbers of NaN and of infinities in a tensor."""

    name: str
    nan: int
    inf: int


@dataclass
class Hint:
    """A tensor whose shape, and that of its neighbours, is what a router or a codebook would have. It is no claim."""

    name: str
    shape: list[int]
    could_be: str
    why: str


@dataclass
class WeightsOnly:
    """What can be said of tensors without an architecture: nothing was run."""

    tensors: int
    bytes: int
    dtypes: dict[str, int]
    zero_rows: list[Rows] = field(default_factory=list)
    duplicate_rows: list[Copies] = field(default_factory=list)
    equal_tensors: list[list[str]] = field(default_factory=list)
    not_finite: list[NotFinite] = field(default_factory=list)
    hints: list[Hint] = field(default_factory=list)
    command: str = ""  # what to try next


@dataclass
class Report:
    """One audit. ``to_dict()`` is the JSON document; ``print(report)`` shows the table."""

    tool: dict[str, str]
    environment: dict[str, Any]
    thresholds: Thresholds
    model: ModelInfo
    probe: ProbeInfo
    layers: list[Layer] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    summary: Summary = field(default_factory=Summary)
    findings: list[Finding] = field(default_factory=list)
    weights: WeightsOnly | None = None  # where there was no architecture
    policy: PolicyInfo | None = None  # where `emscan check` judged it

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data; numbers that are not finite become None."""
        document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return _finite(document)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """Return the table as plain text."""
        from emscan.report.table import render_text

        return render_text(self)

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        from emscan.report.table import render_html

        return render_html(self)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
