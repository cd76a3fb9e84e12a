"""EM207 to EM210: heads of attention. Notes: what a head does can be what was learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from emscan.report.document import Head, Layer, Report
from emscan.rules.registry import Hit, rule
from emscan.rules.words import indicative, listed

_BEYOND = 2.0  # times what uniform attention would give the first key


def _found(
    report: Report, number: Callable[[Head], float | None], meets: Callable[[Head, float], bool]
) -> Iterator[tuple[Layer, list[int], str]]:
    """Yield the rows with heads that meet a condition on a number: the row, their indices, the range of the number."""
    for layer in report.layers:
        heads = (layer.responsibility.heads if layer.responsibility is not None else None) or []
        hit = [(i, value) for i, head in enumerate(heads) if (value := number(head)) is not None and meets(head, value)]
        if hit:
            low, high = min(value for _, value in hit), max(value for _, value in hit)
            reach = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
            yield layer, [i for i, _ in hit], reach


def _hit(report: Report, layer: Layer, heads: list[int], does: str, numbers: str, advice: str) -> Hit:
    assert layer.responsibility is not None
    assert layer.responsibility.heads is not None
    total = len(layer.responsibility.heads)
    said = f"{len(heads)} of {total} heads {does} ({listed(heads)}; {numbers}){indicative(report)}"
    return Hit(f"layer {layer.name}: {said}", layer, tuple(heads), advice)


@rule("EM207", "collapsed-head", "note")
def collapsed_head(report: Report) -> Iterator[Hit]:
    """Heads of attention give each query next to one key alone.

    What it finds: heads whose mean normalized entropy, H(r) over the log of the keys that a query sees, is below the
    threshold `collapsed_head` (0.05).

    Why it matters: the softmax of such a head is at its hard limit: the keys that lose get next to no gradient. Entropy
    that collapses in many heads at once goes with unstable training.

    What to do: nothing where the pattern is meant (a head that copies the previous token). Otherwise normalization of
    queries and keys, or of the spectral norm of their weights (Zhai et al. 2023), is known to keep the entropy up; a
    lower learning rate slows its fall.
    """
    limit = report.thresholds.collapsed_head
    for layer, heads, reach in _found(report, lambda h: h.normalized_entropy, lambda _, value: value < limit):
        yield _hit(
            report, layer, heads, "look at next to one key alone", f"normalized entropy {reach}",
            "normalization of queries and keys, or a lower learning rate, if the pattern is not meant",
        )  # fmt: skip


@rule("EM208", "sink-head", "note")
def sink_head(report: Report) -> Iterator[Hit]:
    """Heads of attention give the first key much of their mass.

    What it finds: heads whose mean mass on the first key is above the threshold `sink` (0.3), and more than twice what
    it would be if every query looked at all its keys alike (short causal sequences have a large first key anyway).

    Why it matters: the first key serves as a place to put mass that no other key should get. That is usual in causal
    language models; caches that drop the first tokens, and quantization of its large activations, break on it.

    What to do: keep the first tokens in a sliding cache; a learned sink or gated attention where it is not wanted.
    """
    limit = report.thresholds.sink

    def beyond(head: Head, value: float) -> bool:
        return value > max(limit, _BEYOND * (head.uniform_first_key or 0.0))

    for layer, heads, reach in _found(report, lambda h: h.first_key, beyond):
        yield _hit(
            report, layer, heads, "rest on the first key", f"mean mass {reach}",
            "keep the first tokens in a sliding cache; a learned sink or a gate if it is not wanted",
        )  # fmt: skip


@rule("EM209", "uniform-head", "note")
def uniform_head(report: Report) -> Iterator[Hit]:
    """Heads of attention look at all keys alike.

    What it finds: heads whose mean normalized entropy is above the threshold `uniform_head` (0.99).

    Why it matters: such a head gives the mean of the values, whatever the query: its query and key weights do nothing
    yet. Networks at initialization are like that.

    What to do: nothing by itself; in a trained network, see whether the head's output matters (pruning).
    """
    limit = report.thresholds.uniform_head
    for layer, heads, reach in _found(report, lambda h: h.normalized_entropy, lambda _, value: value > limit):
        yield _hit(
            report, layer, heads, "look at all their keys alike", f"normalized entropy {reach}",
            "in a trained network, see whether the heads can be pruned",
        )  # fmt: skip


@rule("EM210", "inactive-head", "note")
def inactive_head(report: Report) -> Iterator[Hit]:
    """Heads of attention give next to no output.

    What it finds: heads whose output, the posterior mean of the values, has a mean norm below the threshold
    `inactive_head` (0.05) of the mean over the layer's heads.

    Why it matters: whatever pattern such a head shows, it adds next to nothing; its values carry no signal.

    What to do: prune it, or look at why its values vanished (weight decay on a head that is not used).
    """
    limit = report.thresholds.inactive_head
    for layer, heads, reach in _found(report, lambda h: h.output_norm, lambda _, value: value < limit):
        yield _hit(
            report, layer, heads, "give next to no output", f"norm {reach} of the layer's mean",
            "prune them, or look at why their values vanished",
        )  # fmt: skip
