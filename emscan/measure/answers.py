"""Targets beside what the model handed out, batch by batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emscan.classify.declared import aligned
from emscan.classify.objective import Objective, class_axis
from emscan.measure.calibration import CalibrationBins
from emscan.report.document import Calibration
from emscan.trace.follow import Taps
from emscan.trace.graph import Trace


class Answers:
    """Compares the output that an objective is about with the targets of every batch.

    The scores are the output at ``place`` among the tensors that the model returns; where the model computes its loss
    itself, scores and targets are those of that call (``place`` is None).
    """

    def __init__(self, goal: Objective, place: int | None) -> None:
        self._goal, self._place = goal, place
        self._bins = CalibrationBins()

    @classmethod
    def to(cls, goal: Objective, trace: Trace, taps: Taps) -> Answers | None:
        """Return the comparison for an objective; None where targets have nothing to be compared with."""
        if goal.through is None or goal.output is None or goal.name not in {"cross-entropy", "bce"}:
            return None
        if goal.call is not None:
            found = cls(goal, None)
            taps.on_call(goal.call.key, (id(found), "loss"), lambda named, _: found._hear(named))
            return found
        place = next((i for i, value in enumerate(trace.outputs) if value is goal.output), None)
        return cls(goal, place) if place is not None else None

    def see(self, outputs: list[Tensor], targets: Tensor | None, inputs: list[Tensor]) -> None:
        """See what the model returned for a batch; a batch without targets, or with others, is left out."""
        if self._place is None or targets is None or self._place >= len(outputs):
            return
        found = aligned(targets, inputs, self._goal.next_token)
        if found is not None:
            self._compare(outputs[self._place], found)

    def _hear(self, named: dict[str, Any]) -> None:
        index = named.get("index", named.get("indices"))
        if isinstance(index, list):  # of a lookup by hand: scores[arange, labels],
            self._compare(named["self"], index[self._goal.axis])
            return
        if index is not None:  # or gather
            self._compare(named["self"], index.squeeze(self._goal.axis))
            return
        self._compare(named["self"], named["target"], int(named.get("ignore_index", -100)))

    def _compare(self, values: Tensor, targets: Tensor, ignored: int = -100) -> None:
        goal = self._goal
        if goal.name == "bce":
            if values.numel() == targets.numel():
                self._bins.update_sides(values, targets, goal.form)
            return
        if targets.is_floating_point() or values.dim() < 1:
            return
        if values.dim() == 1 and targets.dim() == 0:
            values, targets = values[None], targets[None]
        if class_axis(tuple(values.shape), targets) == goal.axis:
            self._bins.update_classes(values, targets, goal.axis, goal.form, ignored)

    def result(self) -> Calibration | None:
        """Return accuracy, confidence and calibration error over all targets; None without any."""
        return self._bins.result()
