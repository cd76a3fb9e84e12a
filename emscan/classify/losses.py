"""Losses that the model computes itself: which rows they make, what they are called, and losses on the wrong thing."""

from __future__ import annotations

import torch

from emscan.classify.flow import CLAMPS, DIVISIONS, PRODUCTS, ancestors, computed, descendants, source
from emscan.classify.site import GateForm, Site
from emscan.trace.axes import Axes
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import PASS, VIEW

CROSS_ENTROPY = "aten.cross_entropy_loss"
BCE_ON_LOGITS = "aten.binary_cross_entropy_with_logits"
BCE = "aten.binary_cross_entropy"
LIKELIHOOD = "aten.nll_loss"  # and its forms: nll_loss_nd, nll_loss2d, nll_loss_forward
_ADDS = frozenset({"aten.add", "aten.sub"})
_GATHERS = frozenset({"aten.gather", "aten.take_along_dim"})
_STEPS = 12  # operators between a normalization and what a loss reads


def is_loss(call: Call) -> bool:
    """Whether a call is a loss on class scores or on sides, with targets among its arguments."""
    return call.op in {CROSS_ENTROPY, BCE_ON_LOGITS, BCE} or call.op.startswith(LIKELIHOOD)


def in_model(trace: Trace, axes: Axes) -> list[Site]:
    """Return the sites of losses that the model computes itself: cross-entropy, binary cross-entropy on logits."""
    sites = []
    for call in trace.calls:
        scores = call.inputs[0] if call.inputs else None
        if scores is None or not scores.param or not scores.floating:
            continue
        if call.op == CROSS_ENTROPY:
            axis = -1 if len(scores.shape) == 1 else 1 - len(scores.shape)
            site = over_classes(scores, axis, {call}, call.out)
            if any(factor.origin.kind == "input" for factor in axes.of(scores)[axis]):
                site.kind, site.persistent = "positions", False  # no classes
            _name_contrast(site, call, axes)
            sites.append(site)
        elif call.op == BCE_ON_LOGITS:
            sites.append(over_sides(scores, {call}, call.out))
    return [site for site in sites if (site.count or 0) >= 2]


def _name_contrast(site: Site, call: Call, axes: Axes) -> None:
    """Scores of samples against samples, with targets that the input has no part in: an in-batch contrastive loss."""
    dims, target = axes.of(site.energies), call.arg("target")
    along = dims[site.axes[0]] if len(site.axes) == 1 and -site.axes[0] <= len(dims) else ()
    rows = dims[:1] if site.axes[0] != -len(dims) else ()
    samples = [bool(dim) and all(f.origin.kind == "input" and f.origin.dim == 0 for f in dim) for dim in (along, *rows)]
    if len(samples) == 2 and all(samples) and isinstance(target, Value) and not target.data:
        site.kind, site.persistent = "batch", False
        site.flags.append("contrast")
        site.notes.append("the alternatives are the samples of the batch: an in-batch contrastive loss")


def over_classes(scores: Value, axis: int, members: set[Call], emitted: Value) -> Site:
    """Return the site of a cross-entropy: the classes along ``axis`` compete."""
    return Site(
        "em", "softmax", "Softmax + Cross-Entropy", members, scores, emitted, "log", scores.shape[axis], "classes",
        axes=(axis,), persistent=True, op="cross-entropy",
    )  # fmt: skip


def over_sides(scores: Value, members: set[Call], emitted: Value) -> Site:
    """Return the site of a binary cross-entropy on logits: on and off compete inside every unit."""
    form = GateForm("Sigmoid", torch.sigmoid, "log", lambda z: z)
    return Site("em", "logistic", "Sigmoid + BCE", members, scores, emitted, "log", 2, "on-off", form=form, op="bce")


def name_losses(trace: Trace, sites: list[Site], axes: Axes) -> None:
    """A log-softmax that a negative log-likelihood reads is cross-entropy, as the fused operator is; a sigmoid under a
    binary cross-entropy likewise. What is normalized already and normalized once more, or read as a logarithm that it
    is not, gets a flag."""
    for call in trace.calls:
        if reads_labels(call):
            _name_label_score(call, sites)
        if not is_loss(call) or not call.inputs:
            continue
        read = call.inputs[0]
        if call.op.startswith(LIKELIHOOD):
            _name_likelihood(call, read, sites, axes)
        elif call.op == CROSS_ENTROPY:
            site, form = normalized_by(read, sites)
            own = next((s for s in sites if call in s.members), None)
            if site is not None and form == "probabilities" and own is not None:
                own.flags.append("double-normalization")
                own.notes.append("cross-entropy normalizes again what is already normalized")
        elif call.op == BCE_ON_LOGITS:
            own = next((s for s in sites if call in s.members), None)
            if own is not None and sided_by(read, [s for s in sites if s is not own]) is not None:
                own.flags.append("double-normalization")
                own.notes.append("the loss applies a sigmoid to what is a sigmoid's already")
        else:
            gate = sided_by(read, sites)
            if gate is not None and gate.form is not None and gate.form.label == "Sigmoid":
                gate.label = "Sigmoid + BCE"
                gate.members.add(call)


def _name_likelihood(call: Call, read: Value, sites: list[Site], axes: Axes) -> None:
    site, form = normalized_by(read, sites)
    if site is None:
        return
    if form == "log":
        site.label = "Softmax + Cross-Entropy" if site.mechanism == "softmax" else f"{site.label} + NLL"
        site.kind, site.persistent = "classes", True
        site.members.add(call)
        _name_contrast(site, call, axes)
    else:
        site.flags.append("unlogged")
        site.notes.append("a negative log-likelihood reads probabilities where it expects their logarithms")


def label_axis(call: Call) -> int | None:
    """Return along which axis a call looks one computed entry per row up by an index that is the input's own: a label.

    `gather` says the axis; `scores[arange, labels]` has the labels in its place, and every row once beside them.
    """
    if call.op not in {*_GATHERS, "aten.index"} or not call.out.shape:
        return None
    scores = call.inputs[0]
    if not (computed(scores) and scores.floating):
        return None
    if call.op in _GATHERS:
        axis = call.arg("dim")
        labels = _is_label(call.inputs[-1]) and isinstance(axis, int) and call.out.shape[axis] == 1
        return axis if labels else None
    indices = call.arg("indices")
    if not isinstance(indices, list | tuple) or not len(indices) == len(scores.shape) >= 2:
        return None
    places = [axis for axis, index in enumerate(indices) if isinstance(index, Value) and _is_label(index)]
    others = [(axis, index) for axis, index in enumerate(indices) if axis not in places]
    once = all(isinstance(i, Value) and _every_row(i, scores.shape[axis]) for axis, i in others)
    return places[0] if len(places) == 1 and once else None


def _is_label(index: Value) -> bool:
    return index.data and not index.param and not index.floating


def _every_row(index: Value, size: int) -> bool:
    numbers = index.tensor
    return not index.data and numbers is not None and numbers.flatten().tolist() == list(range(size))


def reads_labels(call: Call) -> bool:
    """Whether a call looks labels up among computed scores."""
    return label_axis(call) is not None


def _label(call: Call) -> Value:
    return next(index for index in reversed(call.inputs) if _is_label(index))


def labels_of(call: Call) -> Value | None:
    """Return the labels that a loss in the model reads; of a lookup by hand, only where the input has them as they are."""
    by_hand = reads_labels(call)
    labels = _label(call) if by_hand else call.arg("target")
    if not isinstance(labels, Value):
        return None
    value = labels
    while by_hand and value.call is not None:
        if not (value.call.op in VIEW or value.call.op in PASS):
            return None  # clamped, say: then some of them are none
        value = value.call.inputs[0]
    return labels


def _name_label_score(call: Call, sites: list[Site]) -> None:
    """The log-share of the label, or log Z less its score, is cross-entropy by hand; what is made of it (a focal
    weight) as well."""
    read, axis = call.inputs[0], label_axis(call)
    assert axis is not None
    rank = len(read.shape)
    site, form = normalized_by(read, sites)
    if site is None or form != "log":
        site = _subtracted(call, sites)
    if site is not None and site.axes == (axis % rank - rank,) and site.mechanism == "softmax":
        site.label, site.kind, site.persistent = "Softmax + Cross-Entropy", "classes", True
        site.members.add(call)


def _subtracted(call: Call, sites: list[Site]) -> Site | None:
    """Return the log-partition that the label's score is subtracted from, or the other way round."""
    scores = source(call.inputs[0])
    for user, operand in descendants(call.out, lambda c: c.op in PASS or c.op in VIEW):
        if user.op not in {"aten.sub", "aten.subtract"} or len(user.inputs) != 2:
            continue
        other = source(next(v for v in user.inputs if v is not operand))
        for site in sites:
            if site.statistic == "log-partition" and source(site.emitted) is other and source(site.energies) is scores:
                return site
    return None


def normalized_by(scores: Value, sites: list[Site]) -> tuple[Site | None, str]:
    """Return the softmax or kernel that ``scores`` are the shares of, and whether as "probabilities" or their "log".

    Views, casts, clamps and small added constants in between change neither.
    """
    emitters = {
        source(s.emitted).id: s
        for s in sites
        if s.mechanism in {"softmax", "kernel"} and s.statistic in {"vector", "mean", "log"} and s.op != "cross-entropy"
    }
    value, logs = source(scores), 0
    for _ in range(_STEPS):
        site = emitters.get(value.id)
        if site is not None:
            level = logs + (site.statistic == "log")
            return (site, "log" if level else "probabilities") if level in (0, 1) else (None, "")
        call = value.call
        if call is None or not call.inputs:
            break
        if call.op == "aten.log":
            logs += 1
        elif call.op == "aten.exp":
            logs -= 1
        elif not (call.op in CLAMPS or (call.op in _ADDS and _constant_beside(call))):
            break
        value = source(next((v for v in call.inputs if computed(v)), call.inputs[0]))
    return None, ""


def _constant_beside(call: Call) -> bool:
    return sum(computed(v) for v in call.inputs) == 1 and all(computed(v) or not v.param for v in call.inputs)


def sided_by(scores: Value, sites: list[Site]) -> Site | None:
    """Return the sigmoid whose shares ``scores`` are, clamped or not."""
    read = source(scores, clamps=True)
    for site in sites:
        if site.mechanism == "logistic" and site.statistic == "vector" and site.kind == "on-off":
            ends = site.form.ends if site.form is not None else None
            if ends == (0.0, 1.0) and source(site.emitted, clamps=True) is read:
                return site
    return None


def loss_on(scores: Value | None, trace: Trace, sites: list[Site]) -> tuple[Call, Site] | None:
    """Return the loss that the model itself computes on its output, and the competition that it is about.

    Without scores among the outputs, the model's only loss is meant.
    """
    found = []
    for call in trace.calls:
        by_hand = reads_labels(call)
        site = next((s for s in sites if call in s.members), None) if by_hand or is_loss(call) else None
        if site is None or (by_hand and (site.mechanism != "softmax" or site.kind != "classes")):
            continue
        # a likelihood reads what the softmax has made of the output
        read = (call.inputs[0], site.energies) if by_hand or call.op.startswith(LIKELIHOOD) else (call.inputs[0],)
        own = {scores.id, source(scores).id} if scores is not None else set()
        if scores is None or any(v.id in own for start in read for v in ancestors(start, _carried)):
            found.append((call, site))
    return found[0] if len(found) == 1 else None


def _carried(call: Call) -> bool:
    return call.op in VIEW or call.op in PASS or call.op in CLAMPS or call.op in PRODUCTS or call.op in DIVISIONS
