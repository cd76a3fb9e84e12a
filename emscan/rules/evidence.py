"""EM4xx: the identity dL/dE = -r, verified or not."""

from __future__ import annotations

import math
from collections.abc import Iterator

from emscan.report.document import Report
from emscan.rules.registry import Hit, rule


@rule("EM401", "evidence-fails", "error")
def evidence_fails(report: Report) -> Iterator[Hit]:
    """What the operators emitted is not the posterior of their energies.

    What it finds: an `em` row whose responsibilities do not sum to one over their alternatives, or differ from
    -d log Z / dE (automatic differentiation in float64), by more than the dtype's precision allows.

    Why it matters: either the numbers are damaged (overflow, a guard that dominates the sum) or the verdict is wrong;
    in both cases the row must not be relied on.

    What to do: look at the range of the energies; if they are sound, report it as a bug of emscan.
    """
    for layer in report.layers:
        proof = layer.evidence
        if proof is None or proof.tolerance is None:
            continue
        errors = [error for error in (proof.sum_error, proof.gradient_error) if error is not None]
        if any(not error <= proof.tolerance for error in errors):  # NaN is no evidence
            off = f"off by {max(errors):.2g}" if all(map(math.isfinite, errors)) else "not finite"
            yield Hit(
                f"layer {layer.name}: responsibilities are {off}; {proof.dtype} explains {proof.tolerance:.2g}",
                layer,
                help="look at the range of the energies and at guards in the denominator",
            )


@rule("EM402", "posterior-detached", "warning")
def posterior_detached(report: Report) -> Iterator[Hit]:
    """The posterior is cut off from the gradient, or replaced by its winner.

    What it finds: responsibilities that reach the output only through `detach` or inside `no_grad`, and
    straight-through estimators (forward the winner, backward the softmax).

    Why it matters: the forward pass competes, but gradient descent does not do EM here: dL/dE is not -r.

    What to do: nothing if it is meant (targets, teachers, hard samples).
    """
    for layer in report.layers:
        if "detached" in layer.flags:
            yield Hit(f"layer {layer.name}: the posterior is detached, no gradient flows through it", layer)
        elif "straight-through" in layer.flags:
            yield Hit(f"layer {layer.name}: straight-through: the gradient is not that of what goes forward", layer)
