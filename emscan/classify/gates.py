"""Elementwise regions -> gate sites: threshold, logistic or smooth, by the curve alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from emscan.classify import logistic, smooth, threshold
from emscan.classify.curve import Curve
from emscan.classify.regions import CLAMPS, KINKED, Region, Regions, is_variable
from emscan.classify.site import GateForm, Site
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import PASS, VIEW

_HALF_RANGE = 1e4  # a bound of this size guards a dtype's range
ROUNDINGS = frozenset(f"aten.{name}" for name in "round floor ceil trunc fix".split())
# Consumers that a clamped value is guarded for.
_GUARDED = frozenset(
    f"aten.{name}" for name in "sqrt rsqrt log log2 log10 log1p reciprocal pow float_power acos asin atanh".split()
)
_DIVISIONS = frozenset(f"aten.{name}" for name in "div divide true_divide".split())
_SCALES = frozenset(f"aten.{name}" for name in "mul add sub rsub neg multiply".split())


def is_guard(call: Call, depth: int = 6) -> bool:
    """Whether a clamp keeps a division, a root, a logarithm or a dtype's range safe."""
    if call.op not in CLAMPS:
        return False
    bounds = [a for a in (*call.args[1:], *call.kwargs.values()) if isinstance(a, int | float)]
    if bounds and all(abs(bound) >= _HALF_RANGE for bound in bounds):
        return True
    return _guarded(call.out, depth)


def _guarded(value: Value, depth: int) -> bool:
    """Whether a value divides, or goes under a root or logarithm; a scale may also be multiplied back."""
    needed = [_needs_guard(value, user, depth) for user in value.users]
    back = [user.op in {"aten.mul", "aten.multiply"} for user in value.users]
    return any(needed) and all(n or b for n, b in zip(needed, back, strict=True))


def _needs_guard(value: Value, user: Call, depth: int) -> bool:
    if user.op in _GUARDED:
        return True
    if user.op in _DIVISIONS and len(user.inputs) > 1 and user.inputs[1] is value:
        return True
    if user.op in _DIVISIONS and user.args[0] is not value:
        return True
    alone = sum(v.data for v in user.inputs) == 1
    passes = user.op in PASS or user.op in VIEW or user.op in CLAMPS or user.op in _DIVISIONS
    passes = passes or (user.op in _SCALES and alone)
    return passes and depth > 0 and _guarded(user.out, depth - 1)


class UnreadError(Exception):
    """A region whose function cannot be had: whether something competes in it is not known."""


@dataclass
class Reading:
    """What an elementwise region is: its mechanism, its form, and the part of it that hands out responsibilities."""

    mechanism: str
    form: GateForm
    region: Region
    before: Reading | None = None  # a clip in front of a two-way gate, or a two-way gate in front of a clip


_KNOWN: dict[tuple[object, ...], tuple[str, GateForm] | None] = {}  # of readings of a whole region


def read(region: Region) -> Reading | None:
    """Return what competes in a region; None where nothing does. The same arithmetic is read once."""
    if not region.nonlinear:
        return None
    signature = region.signature()
    if signature not in _KNOWN:
        if len(_KNOWN) > 256:
            _KNOWN.clear()
        found = _read(region)
        if found is not None and (found.region is not region or found.before is not None):
            return found
        _KNOWN[signature] = (found.mechanism, found.form) if found is not None else None
    known = _KNOWN[signature]
    return Reading(known[0], known[1], region) if known is not None else None


def _read(region: Region) -> Reading | None:
    rounded = next((n for n, call in enumerate(region.calls) if call.op in ROUNDINGS), None)
    if rounded:  # what was computed before the rounding is what competes
        argument = region.calls[rounded].inputs[0]
        found = (
            read(Region(region.base, argument, _leading_to(argument, region))) if argument is not region.base else None
        )
        if found is not None:
            return found
    operators = {call.op for call in region.calls}
    skip = ROUNDINGS  # no side of a rounding is off
    guards = {call.op for call in region.calls if is_guard(call)}
    if guards and all(is_guard(call) for call in region.calls if call.op in guards):
        skip |= frozenset(guards)
    curve = _curve(region, skip)
    inner = next((call for call in region.calls if call.op in logistic.OPERATORS), None)
    if curve is None:  # a function of a part of the line alone, like a logit
        return _built_in(inner, None) if inner is not None else None
    form = logistic.recognize(curve, operators)
    if form is not None and inner is None and not region.scalar and (part := _alike(region)) is not None:
        return part
    if form is not None and (inner is None or region.scalar):
        return Reading("logistic", form, region)
    hard = None if form is not None else threshold.recognize(curve)
    if hard is not None and inner is not None and not curve.stepped and (both := _in_turn(region)) is not None:
        return both
    if hard is not None:
        return Reading("threshold", replace(hard, scalar=region.scalar), region)
    if inner is not None:
        return _built_in(inner, form.label if form is not None else logistic.name_of(curve))
    soft = smooth.recognize(curve)
    return Reading("smooth", soft, region) if soft is not None else None


def _alike(region: Region) -> Reading | None:
    """The longest stretch of a region that is the same two-way gate for every unit, between scalings unit by unit."""
    count = len(region.calls)
    spans = [(i, j) for i in range(-1, count) for j in range(i + 1, count) if j - i < count]
    for i, j in sorted(spans, key=lambda span: span[0] - span[1]):
        base = region.base if i < 0 else region.calls[i].out
        part = Region(base, region.calls[j].out, region.calls[i + 1 : j + 1])
        inside = {base.id, *(c.out.id for c in part.calls)}
        mixed = any(is_variable(v) and v.id not in inside for c in part.calls for v in c.inputs)
        if mixed or not part.scalar or not part.nonlinear:
            continue
        found = read(part)
        if found is not None and found.mechanism == "logistic":
            return found
    return None


def _leading_to(value: Value, region: Region) -> list[Call]:
    """Return the calls of a region that a value inside it is made by, in order."""
    needed, own = {value.id}, []
    for call in reversed(region.calls):
        if call.out.id in needed:
            own.append(call)
            needed.update(v.id for v in call.inputs)
    return own[::-1]


def _in_turn(region: Region) -> Reading | None:
    """A clip and a two-way gate, one after the other: each is a row of its own. None where they cannot be told apart."""
    for index, call in enumerate(region.calls[:-1]):
        cut = call.out
        left = Region(region.base, cut, region.calls[: index + 1])
        right = Region(cut, region.end, region.calls[index + 1 :])
        inside = {cut.id, *(c.out.id for c in right.calls)}
        own = {region.base.id, *(c.out.id for c in left.calls)} - {cut.id}
        if any(v.id in own for c in right.calls for v in c.inputs) or not inside:
            continue
        try:
            first, second = read(left), read(right)
        except UnreadError:
            continue
        if first is None or second is None or first.before or second.before:
            continue
        if {first.mechanism, second.mechanism} == {"threshold", "logistic"}:
            second.before = first
            return second
    return None


def _built_in(call: Call, label: str | None) -> Reading | None:
    """A two-way operator inside other arithmetic (tanhshrink, a learned slope): the competition is that operator's own."""
    argument = next(v for v in call.inputs if is_variable(v))
    alone = Region(argument, call.out, [call])
    curve = _curve(alone, frozenset())
    form = logistic.recognize(curve, {call.op}) if curve is not None else None
    return Reading("logistic", replace(form, label=label or form.label), alone) if form is not None else None


def _curve(region: Region, skip: frozenset[str]) -> Curve | None:
    kinked = any(call.op not in skip for call in region.calls if call.op in KINKED)
    try:
        curve = Curve(region.function(skip=skip), kinked)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        raise UnreadError from None  # an operator that does not run on single numbers
    clamps = {call.op for call in region.calls if call.op in CLAMPS} - skip
    if clamps and curve.usable:
        free = Curve(region.function(skip=skip | clamps), kinked=any(op in KINKED - clamps for op in _ops(region)))
        if free.usable and _nearly_same(curve, free):
            return free  # the clamp trims what the function never does: a guard
    return curve if curve.usable else None


def _ops(region: Region) -> set[str]:
    return {call.op for call in region.calls}


def _nearly_same(a: Curve, b: Curve) -> bool:
    if a.z.shape != b.z.shape or b.limits is None:
        return False
    spread = float(b.y.max() - b.y.min())
    return spread > 0 and float((a.y - b.y).abs().max()) <= 1e-3 * spread


def find(trace: Trace, regions: Regions, claimed: set[Call]) -> list[Site]:
    """Return one site for every gate that no larger site has claimed."""
    sites = [_gated_half(call) for call in trace.calls if call.op == "aten.glu" and is_variable(call.inputs[0])]
    done: dict[Call, Site] = {}
    for end in regions.ends():
        region = regions.region(end)
        if not end.floating and not _multiplies(end):
            continue
        makers = [call for call in region.calls if call.op not in PASS]
        if end.id not in trace.live or any(call in claimed for call in makers):
            continue
        shared = next((done[call] for call in makers if call in done), None)
        if shared is not None:
            shared.members.update(makers)
            continue
        try:
            found = read(region)
        except UnreadError:
            regions.unread.update(makers)
            continue
        if found is None:
            continue
        for reading in (found.before, found):
            if reading is None:
                continue
            part = region if found.before is None else reading.region
            site = _site(part, reading)
            sites.append(site)
            done.update((call, site) for call in part.calls if call.op not in PASS)
    return sites


def _multiplies(mask: Value) -> bool:
    """Whether a comparison is used as a gate: it multiplies numbers or chooses between them."""
    return any(
        user.op in {"aten.mul", "aten.where", "aten.masked_fill", "aten.multiply"} and user.out.floating
        for user in mask.users
    )


def _site(region: Region, found: Reading) -> Site:
    form, inner, mechanism = found.form, found.region, found.mechanism
    members = {call for call in region.calls if call.op not in PASS}
    op = next((call.op for call in inner.calls if call.op not in PASS), "")
    site = Site(
        "em", "logistic", form.label, members, inner.base, inner.end, form.statistic, 2, "on-off",
        form=form, op=op, region=inner.calls,
    )  # fmt: skip
    if mechanism == "threshold":
        site.verdict, site.mechanism, site.leaky = "hard", "threshold", not form.flat
    elif mechanism == "smooth":
        site.verdict, site.mechanism = "soft", "smooth-gate"
    elif form.statistic == "mean":
        site.kind = "sign"
    if form.note:
        site.notes.append(form.note)
    return site


def _gated_half(call: Call) -> Site:
    """GLU in one operator: the second half of the axis gates the first."""
    form = GateForm("GLU", torch.sigmoid, "gate", lambda z: z, half=call.arg("dim", -1))
    return Site("em", "logistic", "GLU", {call}, call.inputs[0], call.out, "gate", 2, "on-off", form=form, op=call.op)


def recurrent_form(kind: str) -> GateForm:
    """Return the form of a recurrent operator's gates; the gates themselves are recomputed when measured."""
    label = {"lstm": "LSTM gates", "gru": "GRU gates", "tanh": "Tanh", "relu": "ReLU"}[kind]
    if kind == "relu":
        flat = ((-torch.inf, 0.0),)
        return GateForm(label, torch.relu, flat=flat, stuck=(0.0,), output_tells=True)
    return GateForm(label, torch.tanh if kind == "tanh" else torch.sigmoid, "gate")
