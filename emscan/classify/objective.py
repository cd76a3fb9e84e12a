"""What the training objective adds after the last layer: cross-entropy, binary cross-entropy, free energy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from emscan.classify.declared import Declared, aligned
from emscan.classify.flow import source
from emscan.classify.losses import (
    BCE,
    BCE_ON_LOGITS,
    CROSS_ENTROPY,
    labels_of,
    loss_on,
    normalized_by,
    over_classes,
    over_sides,
    reads_labels,
    sided_by,
)
from emscan.classify.owners import owner_of
from emscan.classify.site import Site
from emscan.errors import ProbeError, UsageError
from emscan.trace.graph import Call, Trace, Value

OBJECTIVES = ("auto", "cross-entropy", "bce", "free-energy", "none")

# What the output hands out about its alternatives, for reading responsibilities off it.
Form = Literal["scores", "log", "probabilities", "odds", "sides"]


@dataclass
class Objective:
    """The objective in force and why.

    ``added``: the competitions that it adds to those of the model; ``through``: the one whose row answers to targets.
    ``output``: what holds its scores, in ``form``, classes along ``axis``; ``call``: the loss, where the model computes
    it itself. ``targets``: those that go with the trace, one per competition, None where there are none that fit.
    """

    name: str
    reason: str
    added: list[Site] = field(default_factory=list)
    through: Site | None = None
    output: Value | None = None
    form: Form = "scores"
    axis: int = -1
    call: Call | None = None
    next_token: bool = False
    targets: Tensor | None = None


def class_axis(shape: tuple[int, ...], targets: Tensor | None) -> int | None:
    """Return the axis of the class scores (negative), by the shape of the targets where there are any."""
    if targets is None:
        return (1 - len(shape) if len(shape) == 4 else -1) if len(shape) >= 2 else None
    wanted = tuple(targets.shape)
    if shape[:-1] == wanted or (len(wanted) == 2 and wanted[1] == 1 and shape[:-1] == wanted[:1]):
        return -1
    if len(shape) >= 2 and (shape[0], *shape[2:]) == wanted:
        return 1 - len(shape)
    return None


def resolve(
    name: str,
    trace: Trace,
    targets: Tensor | None,
    sites: list[Site],
    all_targets: Tensor | None = None,
    says: Declared | None = None,
) -> Objective:
    """Return the objective to apply to the model's scores; ``targets`` go with the trace, ``all_targets`` say their
    range, ``says`` is what a saved configuration names.

    Raises UsageError for one that does not fit the output."""
    if name == "none":
        return Objective("none", "as asked")
    scores = next((v for v in trace.outputs if v.floating and len(v.shape) >= 1), None)
    if name == "auto":
        everything = all_targets if all_targets is not None else targets
        return _automatic(scores, trace, targets, sites, everything, says)
    if scores is None:
        raise UsageError("the model returns no floating-point scores", f"--objective {name} needs them")
    if name == "cross-entropy":
        fits = says is not None and targets is None and says.fits(scores.shape)
        axis = says.axis if fits and says is not None else class_axis(scores.shape, targets)
        if axis is None:
            raise UsageError(
                f"an output of shape {tuple(scores.shape)} does not fit targets of shape "
                f"{tuple(targets.shape) if targets is not None else None}",
                "give integer targets with one class per score vector, or another --objective",
            )
        if scores.shape[axis] < 2:
            raise UsageError("the model returns one score, so no classes compete", "use --objective bce")
        _check_classes(all_targets if all_targets is not None else targets, scores.shape[axis])
        return _cross_entropy(scores, axis, trace, sites, "as asked", targets, says)
    if name == "bce":
        return _binary(scores, trace, sites, "as asked", targets)
    return _free_energy(scores, sites)


def _check_classes(targets: Tensor | None, count: int) -> None:
    """Raise ProbeError for targets that name no class of ``count``; -100 is what torch's cross-entropy ignores."""
    if targets is None or targets.is_meta:
        return
    if targets.is_floating_point() or targets.dtype == torch.bool:
        held = str(targets.dtype).removeprefix("torch.")
        raise ProbeError(f"cross-entropy takes integer targets, the probe's hold {held}", "give one class per sample")
    named = targets[targets != -100]
    if named.numel() and not 0 <= int(named.min()) <= int(named.max()) < count:
        raise ProbeError(
            f"the probe's targets name classes from {int(named.min()):,} to {int(named.max()):,}, "
            f"the model has {count:,} scores (0 to {count - 1:,})",
            "number the classes as in training",
        )


def _automatic(
    scores: Value | None, trace: Trace, targets: Tensor | None, sites: list[Site], everything: Tensor | None,
    says: Declared | None,
) -> Objective:  # fmt: skip
    computed = loss_on(scores, trace, sites)
    if computed is not None:
        return _computed(*computed)
    if says is None or (says.name == "cross-entropy" and not says.spans):
        by_targets = _by_targets(scores, trace, targets, sites, everything, says)
        if isinstance(by_targets, Objective) or says is None:
            return by_targets if isinstance(by_targets, Objective) else Objective("none", by_targets)
    if scores is None:
        return Objective("none", "the model returns no scores")
    return _by_configuration(says, scores, trace, sites, targets)


def _computed(call: Call, site: Site) -> Objective:
    """The model itself computes its loss, from targets among its inputs."""
    binary = call.op in {BCE, BCE_ON_LOGITS}
    form: Form = "scores" if call.op == CROSS_ENTROPY else "log"
    if binary:
        form = "odds" if call.op == BCE_ON_LOGITS else "sides"
    read, labels = call.inputs[0], labels_of(call)
    axis = 1 - len(read.shape) if len(read.shape) > 1 else -1
    held = labels.tensor if labels is not None else None
    if reads_labels(call):
        axis = site.axes[0]
        held = held.squeeze(axis) if held is not None and held.dim() == len(read.shape) else held
        form = "log" if normalized_by(read, [site])[1] == "log" else "scores"
    return Objective(
        "bce" if binary else "cross-entropy", "computed by the model", [], site,
        read if labels is not None else None, form, axis, call, targets=held,
    )  # fmt: skip


def _by_targets(
    scores: Value | None, trace: Trace, targets: Tensor | None, sites: list[Site], everything: Tensor | None,
    says: Declared | None,
) -> Objective | str:  # fmt: skip
    """Cross-entropy where integer targets name one of the scores each; else why not."""
    if scores is None or targets is None or targets.is_floating_point() or targets.dtype == torch.bool:
        return "no integer targets in the probe"
    axis = class_axis(scores.shape, targets)
    if axis is None or scores.shape[axis] < 2 or not targets.numel():
        return "the targets do not fit the output"
    count = scores.shape[axis]
    named = everything if everything is not None else targets
    named = named[named != -100]  # what torch's cross-entropy ignores
    if not named.numel():
        return "no target names a class"
    low, high = int(named.min()), int(named.max())
    if low < 0 or high >= count:
        return f"targets outside [0, {count})"
    if normalized_by(scores, sites)[0] is not None and high != count - 1:
        # normalized over something else than the classes: components of an encoder, say
        return f"the output is normalized over {count} alternatives, the targets name {high + 1}"
    reason = f"integer targets in [0, {count}) for {count} scores"
    return _cross_entropy(scores, axis, trace, sites, reason, targets, says)


def _by_configuration(
    says: Declared, scores: Value, trace: Trace, sites: list[Site], targets: Tensor | None
) -> Objective:
    """The loss that the saved configuration names, where the output looks like its scores."""
    if says.name == "none":
        return Objective("none", says.reason)
    if says.spans:
        return _spans(says, trace)
    if not says.fits(scores.shape) or scores.shape[says.axis] < 2:
        return Objective("none", f"{says.reason}, but the output of shape {tuple(scores.shape)} is not its scores")
    if says.name == "bce":
        return _binary(scores, trace, sites, says.reason, targets)
    if says.by_labels and targets is not None and targets.is_floating_point() and tuple(targets.shape) == scores.shape:
        return _binary(scores, trace, sites, f"{says.reason}; targets that are shares", targets)
    if normalized_by(scores, sites)[1] == "probabilities":  # whoever trained it need not have used that loss
        return Objective("none", f"{says.reason}, but the output is normalized already")
    fitting = targets if targets is not None and class_axis(scores.shape, targets) == says.axis else None
    return _cross_entropy(scores, says.axis, trace, sites, says.reason, fitting, says)


def _spans(says: Declared, trace: Trace) -> Objective:
    """Scores of where an answer starts and ends: two competitions of the positions, through one layer."""
    ends = [v for v in trace.outputs if v.floating and len(v.shape) >= 1][:2]
    lengths = {tuple(v.shape) for v in trace.inputs if not v.floating}
    shape = ends[0].shape if ends else ()
    alike = len(ends) == 2 and ends[1].shape == shape and len(shape) == 2 and shape[1] >= 2 and shape in lengths
    owner = owner_of(ends[0]) if alike else None
    if owner is None or owner_of(ends[1]) is not owner:
        return Objective("none", f"{says.reason}, but the outputs are not scores of a start and an end")
    added = [over_classes(end, -1, set(), end) for end in ends]
    for site in added:
        site.kind, site.persistent = "positions", False
    return Objective("cross-entropy", says.reason, added)


def _cross_entropy(
    scores: Value, axis: int, trace: Trace, sites: list[Site], reason: str, targets: Tensor | None, says: Declared | None
) -> Objective:  # fmt: skip
    found = Objective("cross-entropy", reason, output=scores, axis=axis)
    found.next_token = says is not None and says.next_token
    if targets is not None and not targets.is_floating_point():
        tokens = [v.tensor for v in trace.inputs if v.tensor is not None]
        found.targets = aligned(targets, tokens, found.next_token)
    present, form = normalized_by(scores, sites)
    if present is None:
        computed = loss_on(scores, trace, sites)
        found.through = computed[1] if computed is not None else over_classes(scores, axis, set(), scores)
        found.added = [] if computed is not None else [found.through]
        return found
    found.through = present
    if form == "log":
        found.form = "log"
        if not present.label.endswith(("+ NLL", "Cross-Entropy")):
            present.label += " + NLL"
        return found
    found.form = "probabilities"
    present.flags.append("double-normalization")
    present.notes.append("cross-entropy normalizes again what is already normalized")
    return found


def _binary(scores: Value, trace: Trace, sites: list[Site], reason: str, targets: Tensor | None) -> Objective:
    found = Objective("bce", reason, output=scores)
    if targets is not None and targets.numel() == math.prod(scores.shape):
        found.targets = targets
    gate, computed = sided_by(scores, sites), loss_on(scores, trace, sites)
    if gate is not None:
        found.through, found.form = gate, "sides"
        return found
    emitted = source(scores)
    if any(site.mechanism == "logistic" and source(site.emitted) is emitted for site in sites):
        return found  # a gate of another form: how targets relate to it is not known
    found.form, found.through = "odds", computed[1] if computed is not None else over_sides(scores, set(), scores)
    found.added = [] if computed is not None else [found.through]
    return found


def _free_energy(scores: Value, sites: list[Site]) -> Objective:
    if normalized_by(scores, sites)[0] is not None or len(scores.shape) < 2 or scores.shape[-1] < 2:
        return Objective("free-energy", "as asked", output=scores)
    site = Site(
        "em", "softmax", "LogSumExp", set(), scores, scores, "log-partition", scores.shape[-1], "prototypes",
        persistent=True, op="free-energy", sign=-1.0,
    )  # fmt: skip
    return Objective("free-energy", "as asked", [site], output=scores)
