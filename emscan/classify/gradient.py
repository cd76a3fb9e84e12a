"""What of a competition goes forward, and whether a gradient comes back from there."""

from __future__ import annotations

from emscan.classify.flow import cut_off
from emscan.classify.site import Site
from emscan.trace.graph import Trace, Value


class Reach:
    """Which values lead to what the model returns, and how."""

    def __init__(self, trace: Trace) -> None:
        self._live = trace.live
        self._with_gradient = _reaching(trace)
        self._going = _reaching(trace, stopped=False)

    def rank(self, value: Value) -> int:
        """Return 3 where a gradient comes back to a value, 2 where its numbers go forward without one, 1 where only
        indices and masks made of it do, 0 where nothing does: it is kept for monitoring, say."""
        if self._with_gradient is not None and value.id in self._with_gradient:
            return 3
        if self._going is not None and value.id in self._going:
            return 2
        return int(value.id in self._live)

    def follow(self, site: Site) -> None:
        """Find from the graph whether the posterior reaches the output, or its energies the parameters, with gradient."""
        if site.verdict != "em" or not site.members:
            return
        stopped = any(call.no_grad for call in site.members if any(v.id in self._live for v in call.outputs))
        reached = self._with_gradient is None or site.emitted.id in self._with_gradient
        if stopped or not reached or cut_off(site.energies):
            site.differentiable = False
            if self._going is not None and site.emitted.id not in self._going:
                site.notes.append("only indices or masks made from it go forward: no gradient comes back, in this run")
                return
            site.flags.append("detached")
            site.notes.append(
                "the posterior is detached: no gradient flows through it, so the identity does not hold here"
            )


def _reaching(trace: Trace, *, stopped: bool = True) -> set[int] | None:
    """Return the ids of the values from which a gradient path leads to a floating output; None if there is none.

    ``stopped``: a path ends where the model stops gradients; without it, only indices and masks end one. A model
    that returns indices alone passes no gradient from there: its loss is taken elsewhere.
    """
    queue = [v for v in trace.outputs if v.floating]
    reaching = {v.id for v in queue}
    for value in queue:
        call = value.call
        if call is None or not value.floating or (stopped and (call.op == "aten.detach" or call.no_grad)):
            continue
        for parent in call.inputs:
            if parent.id not in reaching:
                reaching.add(parent.id)
                queue.append(parent)
    return reaching or None
