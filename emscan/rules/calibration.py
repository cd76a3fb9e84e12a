"""EM2xx: whether what the output row says about its targets is so."""

from __future__ import annotations

import math
from collections.abc import Iterator

from emscan.report.document import Report
from emscan.rules.registry import Hit, rule

_CHANCE = 0.4  # the mean size of a share's error is at most 0.4 / sqrt(n), so that of the sum 0.4 sqrt(bins / n)


@rule("EM211", "miscalibrated", "note")
def miscalibrated(report: Report) -> Iterator[Hit]:
    """The output is more confident, or less, than it is right.

    What it finds: an output row with targets whose expected calibration error (15 equal bins of max r) is above 0.1, by
    more than chance explains: with n targets a perfectly calibrated output shows about 0.4 sqrt(15 / n). Synthetic
    probes are left out.

    Why it matters: its responsibilities are no probabilities of being right, so thresholds on them mislead.

    What to do: temperature scaling on held-out data changes no prediction and is known to mend most of it (Guo et al.
    2017); label smoothing or early stopping in the next training. Check that the probe is not
    training data and not of another kind.
    """
    for layer in report.layers:
        found = layer.responsibility.calibration if layer.responsibility is not None else None
        if found is None or found.error is None or report.probe.synthetic or not found.targets:
            continue
        if found.error > report.thresholds.calibration + _CHANCE * math.sqrt(found.bins / found.targets):
            yield Hit(
                f"layer {layer.name}: mean confidence {found.confidence or 0:.1%}, right {found.accuracy or 0:.1%} of "
                f"{found.targets:,} targets (expected calibration error {found.error:.2g})",
                layer,
                help="temperature scaling on held-out data; check that the probe is what the model was made for",
            )
