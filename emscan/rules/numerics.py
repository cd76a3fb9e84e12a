"""EM3xx: numbers that are no numbers."""

from __future__ import annotations

from collections.abc import Iterator

from emscan.report.document import Report
from emscan.rules.registry import Hit, rule


@rule("EM301", "non-finite", "error")
def non_finite(report: Report) -> Iterator[Hit]:
    """A layer hands out NaN or infinity.

    What it finds: values that are not finite among the energies or outputs of a row, on the probe.

    Why it matters: statistics over them mean nothing (they are null in the report), and whatever follows is NaN.

    What to do: look at the first such layer in the order of the rows; check the probe's range and the dtype.
    """
    for layer in report.layers:
        if "non-finite" in layer.flags:
            yield Hit(
                f"layer {layer.name}: values that are not finite",
                layer,
                help="start at the first such layer; check the probe's range and the dtype",
            )


@rule("EM302", "non-finite-weight", "error")
def non_finite_weight(report: Report) -> Iterator[Hit]:
    """A tensor of a file without an architecture holds NaN or infinity.

    What it finds: weights that are not finite. (With an architecture, EM301 says which layer hands them out.)

    Why it matters: whatever is computed from them is NaN or infinite.

    What to do: go back to the last checkpoint without them; lower the learning rate or clip gradients from there.
    """
    for bad in report.weights.not_finite if report.weights is not None else ():
        yield Hit(
            f"tensor {bad.name}: NaN {bad.nan:,} times, infinite {bad.inf:,} times",
            help="go back to the last checkpoint without them",
            subject=bad.name,
        )
