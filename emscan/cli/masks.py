"""`--prune-file`: masks of dead units, made while the model is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from emscan.cli.running import After
from emscan.report.document import Report
from emscan.report.phrases import printable

if TYPE_CHECKING:
    from emscan.load import LoadedModel
    from emscan.probe import Probe


def pruning_to(path: Path | None) -> After | None:
    """Return what writes masks to a file after an audit and says on stderr which units they are of, None for none."""
    if path is None:
        return None

    def after(loaded: LoadedModel, probe: Probe, report: Report) -> None:
        from emscan import pruning

        assert loaded.module is not None
        found = pruning.masks(loaded.module, report, probe)
        pruning.write(path, found, report)
        number, layers = sum(map(len, found.units.values())), len(found.units)
        print(
            f"emscan: wrote masks of {number} unit{'s' if number != 1 else ''} in {layers} "
            f"layer{'s' if layers != 1 else ''} to {printable(str(path))}: the outputs on the probe stay as they are",
            file=sys.stderr,
        )
        for name, why in found.left.items():
            print(
                f"emscan: note: layer {printable(name)}: not all of its dead units are in the masks: {why}",
                file=sys.stderr,
            )

    return after
