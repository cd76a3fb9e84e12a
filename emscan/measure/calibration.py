"""How right an output is about its targets: accuracy, confidence and expected calibration error, streamed.

With the confidence c = max r of every competition, in M = 15 equal bins of (0, 1], each closed above:
ECE = sum_b n_b / n |accuracy_b - mean c_b| (Naeini et al. 2015; Guo et al. 2017). Of two-way units, c = max(r, 1 - r),
and right is the side that r gives more than half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emscan.classify.objective import Form
from emscan.report.document import Calibration

BINS = 15
_PIECE = 1 << 18  # scores taken at a time
_TOGETHER = 1 << 16  # competitions binned at a time
_EXACT = 4096  # up to this many classes in float64; of more, float32 rounding averages out within a competition


class CalibrationBins:
    """Per bin of confidence: how many competitions, how many of them right, and the sum of their confidence."""

    def __init__(self, bins: int = BINS) -> None:
        self.count = torch.zeros(bins, dtype=torch.int64)
        self.right = torch.zeros(bins, dtype=torch.int64)
        self.confidence = torch.zeros(bins, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor]] = []  # small batches are binned together
        self._waiting_count = 0

    def update_classes(
        self, values: Tensor, targets: Tensor, axis: int = -1, form: Form = "scores", ignored: int = -100
    ) -> None:
        """See scores, log-probabilities or probabilities with the classes along ``axis``, and the class of each.

        ``targets``: integers, one per competition in the same order; ``ignored``, negative ones and those beyond the
        classes name none. Rows that are not finite are left out. Raises ValueError where the numbers disagree.
        """
        count = values.shape[axis]
        rows = values.detach().movedim(axis, -1).reshape(-1, count)
        wanted = targets.detach().to(rows.device).flatten()
        if len(rows) != len(wanted):
            raise ValueError(f"{len(wanted)} targets for {len(rows)} competitions")
        step = max(1, _PIECE // count)
        for start in range(0, len(rows), step):
            part, y = rows[start : start + step], wanted[start : start + step]
            low, high = (int(end) for end in torch.aminmax(y))
            if low < 0 or high >= count or low <= ignored <= high:
                named = (y >= 0) & (y < count) & (y != ignored)
                part, y = part[named], y[named]
            wide = part.double() if count <= _EXACT else part.float()
            best, place = wide.max(-1)
            if form == "scores":
                confidence = 1 / (wide - best.unsqueeze(-1)).exp_().sum(-1, dtype=torch.float64)
            else:
                confidence = (best.exp() if form == "log" else best).double()
            self._add(confidence, place == y)

    def update_sides(self, values: Tensor, targets: Tensor, form: Form = "odds") -> None:
        """See log-odds ("odds") or shares ("sides") of the upper side, and targets in [0, 1], one per value.

        Targets outside of [0, 1] name no side. Raises ValueError where the numbers disagree.
        """
        flat, wanted = values.detach().flatten(), targets.detach().flatten()
        if len(flat) != len(wanted):
            raise ValueError(f"{len(wanted)} targets for {len(flat)} values")
        for start in range(0, len(flat), _PIECE):
            part = flat[start : start + _PIECE].double()
            y = wanted[start : start + _PIECE].to(part.device).double()
            named = (y >= 0) & (y <= 1)
            if not bool(named.all()):
                part, y = part[named], y[named]
            r = part.sigmoid() if form == "odds" else part
            self._add(torch.maximum(r, 1 - r), (r > 0.5) == (y > 0.5))

    def _add(self, confidence: Tensor, right: Tensor) -> None:
        self._waiting.append((confidence, right))
        self._waiting_count += len(confidence)
        if self._waiting_count >= _TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Bin what waits to be binned."""
        if not self._waiting:
            return
        confidence, right = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_count = [], 0
        real = confidence.isfinite()
        if not bool(real.all()):
            confidence, right = confidence[real], right[real]
        bins = len(self.count)
        places = (confidence * bins).ceil_().long().sub_(1).clamp_(0, bins - 1)
        self.count += torch.bincount(places, minlength=bins).cpu()
        self.right += torch.bincount(places[right], minlength=bins).cpu()
        self.confidence += torch.bincount(places, weights=confidence, minlength=bins).cpu()

    def merge(self, other: CalibrationBins) -> None:
        """Add what another probe shard has shown."""
        self.settle()
        other.settle()
        self.count += other.count
        self.right += other.right
        self.confidence += other.confidence

    def result(self) -> Calibration | None:
        """Return the statistics; None without targets."""
        self.settle()
        total = int(self.count.sum())
        if not total:
            return None
        gap = (self.right - self.confidence).abs().sum()
        return Calibration(
            total,
            accuracy=int(self.right.sum()) / total,
            confidence=float(self.confidence.sum()) / total,
            error=float(gap) / total,
            bins=len(self.count),
        )
