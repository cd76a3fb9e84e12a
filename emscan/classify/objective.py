"""What the training objective adds after the last layer: cross-entropy, binary cross-entropy, free energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emscan.classify.flow import source
from emscan.classify.site import GateForm, Site
from emscan.errors import UsageError
from emscan.trace.graph import Call, Trace, Value

OBJECTIVES = ("auto", "cross-entropy", "bce", "free-energy", "none")


@dataclass
class Objective:
    """The objective in force and why; ``site`` is the competition that it adds, None if it adds none."""

    name: str
    reason: str
    site: Site | None = None
    output: Value | None = None


def in_model(trace: Trace) -> list[Site]:
    """Return the sites of losses that the model computes itself: cross-entropy, binary cross-entropy on logits."""
    sites = []
    for call in trace.calls:
        scores = call.inputs[0] if call.inputs else None
        if scores is None or not scores.param or not scores.floating:
            continue
        if call.op == "aten.cross_entropy_loss":
            axis = -1 if len(scores.shape) == 1 else 1 - len(scores.shape)
            sites.append(_classes(scores, axis, {call}, call.out))
        elif call.op == "aten.binary_cross_entropy_with_logits":
            sites.append(_sides(scores, {call}, call.out))
    return [site for site in sites if (site.count or 0) >= 2]


def name_losses(trace: Trace, sites: list[Site]) -> None:
    """A log-softmax that a negative log-likelihood reads is cross-entropy, as the fused operator is."""
    for call in trace.calls:
        if not call.op.startswith("aten.nll_loss") or not call.inputs:
            continue
        read = source(call.inputs[0])
        for site in sites:
            if site.statistic == "log" and site.mechanism == "softmax" and source(site.emitted) is read:
                site.label, site.kind, site.persistent = "Softmax + Cross-Entropy", "classes", True
                site.members.add(call)


def _classes(scores: Value, axis: int, members: set[Call], emitted: Value) -> Site:
    return Site(
        "em", "softmax", "Softmax + Cross-Entropy", members, scores, emitted, "log", scores.shape[axis], "classes",
        axes=(axis,), persistent=True, op="cross-entropy",
    )  # fmt: skip


def _sides(scores: Value, members: set[Call], emitted: Value) -> Site:
    form = GateForm("Sigmoid", torch.sigmoid, "log", lambda z: z)
    return Site("em", "logistic", "Sigmoid + BCE", members, scores, emitted, "log", 2, "on-off", form=form, op="bce")


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
    name: str, trace: Trace, targets: Tensor | None, sites: list[Site], all_targets: Tensor | None = None
) -> Objective:
    """Return the objective to apply to the model's scores; ``targets`` go with the trace, ``all_targets`` say their range.

    Raises UsageError for one that does not fit the output."""
    if name == "none":
        return Objective("none", "as asked")
    scores = next((v for v in trace.outputs if v.floating and len(v.shape) >= 1), None)
    if name == "auto":
        return _automatic(scores, targets, sites, all_targets if all_targets is not None else targets)
    if scores is None:
        raise UsageError("the model returns no floating-point scores", f"--objective {name} needs them")
    if name == "cross-entropy":
        axis = class_axis(scores.shape, targets)
        if axis is None:
            raise UsageError(
                f"an output of shape {tuple(scores.shape)} does not fit targets of shape "
                f"{tuple(targets.shape) if targets is not None else None}",
                "give integer targets with one class per score vector, or another --objective",
            )
        if scores.shape[axis] < 2:
            raise UsageError("the model returns one score, so no classes compete", "use --objective bce")
        return _cross_entropy(scores, axis, sites, "as asked")
    if name == "bce":
        return _binary(scores, sites)
    return _free_energy(scores, sites)


def _automatic(scores: Value | None, targets: Tensor | None, sites: list[Site], everything: Tensor | None) -> Objective:
    if scores is None or targets is None or targets.is_floating_point() or targets.dtype == torch.bool:
        return Objective("none", "no integer targets in the probe")
    axis = class_axis(scores.shape, targets)
    if axis is None or scores.shape[axis] < 2 or not targets.numel():
        return Objective("none", "the targets do not fit the output")
    count = scores.shape[axis]
    named = everything if everything is not None else targets
    named = named[named != -100]  # what torch's cross-entropy ignores
    if not named.numel():
        return Objective("none", "no target names a class")
    low, high = int(named.min()), int(named.max())
    if low < 0 or high >= count:
        return Objective("none", f"targets outside [0, {count})")
    if _emitter(scores, sites) is not None and high != count - 1:
        # normalized over something else than the classes: components of an encoder, say
        return Objective("none", f"the output is normalized over {count} alternatives, the targets name {high + 1}")
    return _cross_entropy(scores, axis, sites, f"integer targets in [0, {count}) for {count} scores")


def _emitter(scores: Value, sites: list[Site]) -> Site | None:
    emitted = source(scores)
    return next((s for s in sites if s.mechanism in {"softmax", "kernel"} and source(s.emitted) is emitted), None)


def _cross_entropy(scores: Value, axis: int, sites: list[Site], reason: str) -> Objective:
    present = _emitter(scores, sites)
    if present is not None and present.statistic == "log":
        present.label += " + NLL"
        return Objective("cross-entropy", reason, None, scores)
    if present is not None:
        present.flags.append("double-normalization")
        present.notes.append("cross-entropy normalizes again what is already normalized")
        return Objective("cross-entropy", reason, None, scores)
    return Objective("cross-entropy", reason, _classes(scores, axis, set(), scores), scores)


def _binary(scores: Value, sites: list[Site]) -> Objective:
    emitted = source(scores)
    if any(site.mechanism == "logistic" and source(site.emitted) is emitted for site in sites):
        return Objective("bce", "as asked", None, scores)
    return Objective("bce", "as asked", _sides(scores, set(), scores), scores)


def _free_energy(scores: Value, sites: list[Site]) -> Objective:
    if _emitter(scores, sites) is not None or len(scores.shape) < 2 or scores.shape[-1] < 2:
        return Objective("free-energy", "as asked", None, scores)
    site = Site(
        "em", "softmax", "LogSumExp", set(), scores, scores, "log-partition", scores.shape[-1], "prototypes",
        persistent=True, op="free-energy", sign=-1.0,
    )  # fmt: skip
    return Objective("free-energy", "as asked", site, scores)
