"""Evidence: the responsibilities that the model's own operators emitted, against -d log Z / d E in float64.

For L = log sum_j exp(-E_j), -dL/dE_j = r_j. The left side comes from automatic differentiation of a log-sum-exp over
the energies that entered the site; the right side from the run. Recomputing one from the other would prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from emscan.classify import attention_evidence, recurrent_evidence
from emscan.classify.labels import residual_error
from emscan.classify.means import fit, jacobian
from emscan.classify.posterior_error import compare, posterior
from emscan.classify.regions import Region
from emscan.classify.replay import replay
from emscan.classify.site import Site
from emscan.classify.softmax import SEGMENTS
from emscan.report.document import Evidence
from emscan.trace import excerpts
from emscan.trace.graph import Call, Trace, Value
from emscan.trace.operators import EXTREMUM, RECURRENT, SOFTMAX

_ENTRIES = 1 << 18  # scores or values of a row that are looked at, of evenly spaced competitions
_AWAY = 0.05  # a gate's share is read off as value over energy: not where both vanish


def gather(site: Site, trace: Trace, factor: float, targets: Tensor | None = None) -> Evidence:
    """Return the evidence for an ``em`` site; ``factor`` epsilons of the dtype times sqrt(K) are tolerated.

    With the ``targets`` of its competitions, the gradient of the loss counts too: r minus target.
    """
    dtype = site.emitted.dtype if site.emitted.dtype.is_floating_point else torch.float32
    calls = sorted(site.members, key=lambda call: call.id)
    where = next((call.where for call in calls if call.where), None)
    found = Evidence(op=site.op, source=where, dtype=str(dtype).removeprefix("torch."))
    found.differentiable = site.differentiable
    residual = None
    try:
        errors = _errors(site, trace)
        residual = residual_error(site, targets) if targets is not None else None
    except (RuntimeError, NotImplementedError, TypeError, IndexError, KeyError, ValueError):
        errors = None  # an operator that cannot be run again on its own: no evidence rather than a guess
    if errors is not None:
        found.sum_error, found.gradient_error, reach = errors
        if residual is not None and not residual <= (found.gradient_error or 0.0):  # NaN is worse, too
            found.gradient_error = residual
        epsilon = torch.finfo(dtype).eps
        found.tolerance = factor * epsilon * math.sqrt(site.count or 2) * (1 + reach)
    return found


def _errors(site: Site, trace: Trace) -> tuple[float | None, float | None, float] | None:
    """Return (sum error, gradient error, largest score that matters)."""
    with torch.inference_mode(False), torch.no_grad():
        if site.attention is not None:
            return attention_evidence.errors(site.attention)
        if site.op in RECURRENT:
            return recurrent_evidence.errors(next(iter(site.members)))
        if site.mechanism == "logistic":
            return _two_way(site)
        if site.op in {"cross-entropy", "free-energy"}:
            return _objective(site)
        return _normalized(site, trace)


# ---- K alternatives -----------------------------------------------------------------------------
def _normalized(site: Site, trace: Trace) -> tuple[float, float, float] | None:
    if site.terms:
        return _separate(site)
    if site.numerator is not None:
        return _accumulated(site)
    energies, emitted = site.energies.tensor, site.emitted.tensor
    if energies is None or emitted is None:
        return _by_excerpt(site)
    if site.weights is not None:
        return _hand_written(site, trace)
    if site.statistic == "log-partition":
        return compare(_gradient_of_operator(site, trace, energies), site.sign * energies.double(), site.axes)
    if emitted.shape != energies.shape:
        return None
    (scores, r), axes = _thinned((energies, emitted), site.axes)
    if bool((r <= 0).all()) and _sums_to_one(r.exp(), axes):
        r = r.double().exp()
    return compare(r, site.sign * scores.double(), axes)


def _by_excerpt(site: Site) -> tuple[float, float, float] | None:
    """Some competitions of a softmax operator whose tensors were too large to keep."""
    found = next((c for c in sorted(site.members, key=lambda c: c.id) if c.op in SOFTMAX and c.excerpt), None)
    if found is None:
        return None
    scores, r = found.excerpt
    if scores is None or r is None:
        return None
    return compare(r.double().exp() if "log_softmax" in found.op else r, scores.double(), (-1,))


def _thinned(tensors: tuple[Tensor, ...], axes: tuple[int, ...]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return evenly spaced competitions of tensors of one shape that have too many, alternatives last."""
    size, rank = tensors[0].numel(), tensors[0].dim()
    if size <= _ENTRIES or len(axes) == rank:
        return list(tensors), axes
    last = tuple(range(-len(axes), 0))
    moved = [tensor.movedim(axes, last).flatten(0, rank - len(axes) - 1) for tensor in tensors]
    step = -(-size // _ENTRIES)
    return [tensor[::step] for tensor in moved], last


def _separate(site: Site) -> tuple[float, float, float] | None:
    """Alternatives in separate values: logaddexp's own gradient, or the one share that was divided out."""
    tensors = [term.tensor for term in site.terms]
    if any(tensor is None for tensor in tensors):
        return None
    stacked = torch.stack([tensor for tensor in tensors if tensor is not None], -1)
    if site.statistic != "log-partition":
        share, expected = site.emitted.tensor, posterior(stacked, (-1,))
        if share is None:
            return None
        nearest = (expected - share.double().unsqueeze(-1)).abs().flatten(0, -2).amax(0).min()
        return 0.0, float(nearest), float(stacked.abs().max())
    with torch.enable_grad():
        leaves = [part.detach().clone().requires_grad_(True) for part in stacked.unbind(-1)]
        out = leaves[0]
        for leaf in leaves[1:]:
            out = torch.logaddexp(out, leaf)
        gradients = torch.autograd.grad(out.sum(), leaves)
    return compare(torch.stack(gradients, -1), stacked.double(), (-1,))


def _accumulated(site: Site) -> tuple[float, float, float] | None:
    """Weights as the model's own calls hand them to the values, over the model's denominator, for a few entries."""
    numerator, denominator = site.numerator, site.denominator
    if numerator is None or numerator.tensor is None:
        return None
    sums, differences = [0.0], [0.0]
    emitted = jacobian(numerator, site.mixed, site.values, None)
    exact = jacobian(numerator, site.mixed, site.values, torch.float64)
    for own, weights in zip(emitted, exact, strict=True):
        seen = weights > 0
        if int(seen.sum()) < 2:
            continue
        r = own[seen].double() / own[seen].double().sum()
        _, difference, _ = compare(r, weights[seen].log(), (-1,))
        differences.append(difference)
    ones = {v.id: torch.ones_like(v.tensor) for v in site.values if v.tensor is not None}
    whole = replay(site.mixed, ones, None)[numerator.id]
    total: Tensor | None = torch.ones_like(whole)
    if denominator is not None:
        total = fit(denominator.tensor, whole.shape) if denominator.tensor is not None else None
    if total is None:
        return None
    away = total.abs() > 0
    sums.append(float((whole[away].double() / total[away].double() - 1).abs().max()))
    return max(sums), max(differences), math.log(max(2, site.count or 2))


def _sums_to_one(r: Tensor, axes: tuple[int, ...]) -> bool:
    return bool(((r.double().sum(axes) - 1).abs() < 0.05).all())


def _hand_written(site: Site, trace: Trace) -> tuple[float, float, float] | None:
    """Weights over their sum: log-weights again in float64 from the energies; shares as the model's numbers give them."""
    assert site.weights is not None
    if site.segments is not None:
        return _by_segments(site, trace)
    weights = site.weights.tensor
    again = run_again(trace, site.energies, site.weights, torch.float64)
    if site.statistic == "log-partition" and again is not None and site.energies.tensor is not None:
        handed_back = _gradient_of_operator(site, trace, site.energies.tensor)
        scores = again.clamp(min=0).log()
        fixed = torch.full_like(scores.sum(site.weights_axes), site.sink_weight)
        return compare(handed_back, scores, site.weights_axes, fixed)
    axes = site.weights_axes
    if weights is not None and again is not None and site.denominator is None:  # scaled to even sums, whatever they are
        sums = weights.double().sum(axes, keepdim=True)
        return compare(weights.double() / sums.median(), again.log(), axes)
    total = _total(site)
    if weights is None or again is None or total is None:
        return None
    emitted = site.emitted.tensor
    if emitted is not None and emitted.shape == weights.shape and site.statistic in {"vector", "mean"}:
        r = emitted
    else:  # a posterior mean comes out: its weights are what the model summed and what it divided by
        r = weights.double() / total
    sink = None
    if site.guarded or site.sink:
        sink = (total - weights.double().sum(axes, keepdim=True)).clamp(min=0).sum(axes)
    return compare(r, again.clamp(min=0).log(), axes, sink)


def _by_segments(site: Site, trace: Trace) -> tuple[float, float, float] | None:
    """Shares of edges that meet in a node: log of every node's sum, differentiated in float64."""
    scatter, weights, emitted = site.segments, site.weights, site.emitted.tensor
    if scatter is None or weights is None or emitted is None or site.energies.tensor is None:
        return None
    if site.statistic != "vector" or emitted.shape != site.energies.tensor.shape:
        return None
    with torch.enable_grad():
        s = site.energies.tensor.double().clone().requires_grad_(True)
        again = run_again(trace, site.energies, weights, torch.float64, s)
        if again is None:
            return None
        sums = replay([scatter], {weights.id: again}, torch.float64)[scatter.out.id]
        (expected,) = torch.autograd.grad(sums[sums > 0].log().sum(), s)
    whole = replay([scatter], {weights.id: emitted}, None)[scatter.out.id].double()[sums > 0]
    return float((whole - 1).abs().max()), float((emitted.double() - expected).abs().max()), 1.0


def _total(site: Site) -> Tensor | None:
    """Return the denominator as the model computed it, with one entry along the axes of the alternatives."""
    if site.denominator is None or site.weights is None or site.denominator.tensor is None:
        return None
    value, shape = site.denominator.tensor.double(), site.weights.shape
    if tuple(value.shape) == shape:  # already expanded: all entries along the axes are the same
        return value.mean(site.weights_axes, keepdim=True)
    rank = len(shape)
    kept = [1 if axis - rank in site.weights_axes else size for axis, size in enumerate(shape)]
    return value.reshape(kept) if value.numel() == math.prod(kept) else None


def _gradient_of_operator(site: Site, trace: Trace, energies: Tensor) -> Tensor:
    """The responsibilities that the model's own log-partition hands back: its gradient, in the model's dtype."""
    with torch.enable_grad():
        s = energies.detach().clone().requires_grad_(True)
        out = run_again(trace, site.energies, site.emitted, None, s)
        if out is None:
            raise RuntimeError("the log-partition cannot be run again")
        (gradient,) = torch.autograd.grad(out.sum(), s)
    # one partition per row, however often the model copied it; a row's shares then count once
    copies = max(1, round(float(gradient.double().sum(site.axes).median())))
    return gradient / copies


def run_again(
    trace: Trace, start: Value, end: Value, dtype: torch.dtype | None, value: Tensor | None = None
) -> Tensor | None:
    """Run the recorded calls from ``start`` to ``end`` again, all floats in ``dtype`` if given; None if one cannot."""
    if value is None and start.tensor is None:
        return None
    first = value if value is not None else start.tensor
    assert first is not None
    # a stabilizing shift is a constant of the log-sum-exp, as the run had it
    calls = [call for call in _between(trace, start, end) if call.op not in EXTREMUM | SEGMENTS]
    if any(call.func is None for call in calls):
        return None
    return replay(calls, {start.id: first}, dtype).get(end.id)


def _between(trace: Trace, start: Value, end: Value) -> list[Call]:
    """Return the calls on the ways from ``start`` to ``end``, in order."""
    after = {start.id}
    forward = []
    for call in trace.calls:
        if any(v.id in after for v in call.inputs):
            forward.append(call)
            after.update(out.id for out in call.outputs)
    before = {end.id}
    needed = []
    for call in reversed(forward):
        if any(out.id in before for out in call.outputs) and start.id not in {out.id for out in call.outputs}:
            needed.append(call)
            before.update(v.id for v in call.inputs)
    return needed[::-1]


# ---- two alternatives ---------------------------------------------------------------------------
def _two_way(site: Site) -> tuple[float | None, float | None, float] | None:
    form = site.form
    if form is None or form.log_odds is None:
        return None
    z, y = site.energies.tensor, site.emitted.tensor
    if (z is None or y is None) and site.energies.shape == site.emitted.shape and not _unlike_units(site):
        z, y = (v.few if v.tensor is None else excerpts.entries(v.tensor) for v in (site.energies, site.emitted))
    if z is None or y is None:
        return None
    if site.op == "bce":
        return _bce(z)
    if form.half is not None:
        first, z = z.chunk(2, form.half)
        keep = first.abs() > _AWAY
        first, z, y = first[keep], z[keep], y[keep]
        if not z.numel():  # too near to zero to read a share off: the operator once more, on numbers of ordinary size
            z = torch.linspace(-3, 3, 64, dtype=y.dtype, device=y.device)
            first, y = torch.ones_like(z), F.glu(torch.cat([torch.ones_like(z), z]), 0)
        on, off = y.double() / first.double(), F.glu(torch.cat([first, -z]), 0).double() / first.double()
        return float((on + off - 1).abs().max()), *_against(on, form.log_odds(z.double()))[1:]
    region = Region(site.energies, site.emitted, site.region)
    share = _reader(site, region)
    if z.numel() > _ENTRIES and z.shape == y.shape and not _unlike_units(site):
        step = -(-z.numel() // _ENTRIES)  # some of the values are enough
        z, y = z.flatten()[::step], y.flatten()[::step]
    if form.statistic == "gate" and not bool((z.abs() > _AWAY).any()):
        # too near to zero to read a share off: the model's own operators once more, on energies of ordinary size
        z = torch.linspace(-3, 3, max(2, z.numel()), dtype=z.dtype, device=z.device)[: z.numel()].view_as(z)
        y = region.replay(z)
    keep = z.abs() > _AWAY if form.statistic == "gate" else torch.ones_like(z, dtype=torch.bool)
    if not bool(keep.any()):
        return None
    on = share(z, y)[keep]
    _, gradient_error, reach = _against(on, form.log_odds(z.double())[keep])
    if form.mirror is None:
        return None, gradient_error, reach
    mirrored = form.mirror(z)
    off = share(mirrored, region.replay(mirrored))[keep]
    return float((on + off - 1).abs().max()), gradient_error, reach


def _unlike_units(site: Site) -> bool:
    """Whether the gate differs from unit to unit, so that values cannot be taken out of their places."""
    return any(v.param and not v.data and v.shape for call in site.region for v in call.inputs)


def _reader(site: Site, region: Region) -> Callable[[Tensor, Tensor], Tensor]:
    """Return how the share of the on side is read off what the gate emitted: (z, y) -> r, float64."""
    form = site.form
    assert form is not None
    low, high = form.ends

    def slope(z: Tensor, _y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = z.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(region.replay(at).sum(), at)
        return (gradient.double() - low) / (high - low)

    if form.statistic == "log-partition":
        return slope
    if form.statistic == "log":
        return lambda _, y: y.double().exp()
    if form.statistic == "gate":
        return lambda z, y: (y.double() / z.double() - low) / (high - low)
    return lambda _, y: (y.double() - low) / (high - low)


def _against(on: Tensor, odds: Tensor) -> tuple[None, float, float]:
    with torch.enable_grad():
        u = odds.detach().double().clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(torch.logaddexp(u, torch.zeros_like(u)).sum(), u)
    return None, float((on.double() - expected).abs().max()), float(odds.abs().clamp(max=1).max())


# ---- what an objective adds -----------------------------------------------------------------------
def _objective(site: Site) -> tuple[float, float, float] | None:
    """Cross-entropy hands back r - 1[y], free energy -r: torch's own gradient in the model's dtype."""
    scores = site.energies.tensor
    if scores is None:
        return None
    rows = scores.movedim(site.axes[0], -1).reshape(-1, scores.shape[site.axes[0]])
    rows = rows[:: -(-rows.numel() // _ENTRIES)][: max(1, 8 * _ENTRIES // rows.shape[1])]
    with torch.enable_grad():
        s = rows.detach().clone().requires_grad_(True)
        if site.op == "cross-entropy":
            targets = torch.zeros(len(rows), dtype=torch.long, device=s.device)
            loss = torch.nn.functional.cross_entropy(s, targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, s)
            r = gradient.double()
            r[:, 0] += 1
        else:
            (gradient,) = torch.autograd.grad(torch.logsumexp(site.sign * s, 1).sum(), s)
            r = site.sign * gradient.double()
    return compare(r, site.sign * rows.double(), (-1,))


def _bce(z: Tensor) -> tuple[float, float, float]:
    with torch.enable_grad():
        s = z.detach().clone().requires_grad_(True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(s, torch.zeros_like(s), reduction="sum")
        (on,) = torch.autograd.grad(loss, s)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(s, torch.ones_like(s), reduction="sum")
        (off,) = torch.autograd.grad(loss, s)
    _, error, reach = _against(on, z.double())
    return float((on.double() - off.double() - 1).abs().max()), error, reach
