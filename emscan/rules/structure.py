"""EM0xx: structure that is almost surely not meant."""

from __future__ import annotations

from collections.abc import Iterator

from emscan.report.document import Report
from emscan.rules.registry import Hit, rule


@rule("EM001", "batch-softmax", "error")
def batch_softmax(report: Report) -> Iterator[Hit]:
    """A softmax runs over the batch axis.

    What it finds: a normalization whose alternatives are the samples of the batch, so that the result for one sample
    depends on which others happen to be beside it.

    Why it matters: it is almost always a wrong `dim`. The network trains, and its outputs change with the batch size.

    What to do: normalize over the axis of the classes, heads or keys. An in-batch contrastive loss that the model
    computes itself (cross-entropy of samples against samples) means it, and is left out.
    """
    for layer in report.layers:
        if layer.alternatives is not None and layer.alternatives.kind == "batch" and "contrast" not in layer.flags:
            count = layer.alternatives.count
            yield Hit(
                f"layer {layer.name}: the softmax runs over the {count} samples of the batch",
                layer,
                help="check its dim: alternatives are usually classes, experts or keys",
            )


@rule("EM002", "double-normalization", "error")
def double_normalization(report: Report) -> Iterator[Hit]:
    """Cross-entropy is applied to an output that is already normalized.

    What it finds: a model that ends in softmax (or another normalization), audited with cross-entropy, which
    normalizes again; and a model that computes such a loss itself, sigmoid and binary cross-entropy on logits included.

    Why it matters: the second softmax sees numbers in [0, 1], so the loss can never come near zero and the gradient
    is no longer responsibility minus label.

    What to do: return logits, or log-probabilities with a negative log-likelihood loss.
    """
    for layer in report.layers:
        if "double-normalization" in layer.flags:
            two_way = layer.mechanism == "logistic"
            again = (
                "a sigmoid's, and the loss applies another"
                if two_way
                else "normalized, and cross-entropy normalizes it again"
            )
            yield Hit(
                f"layer {layer.name}: the output is {again}",
                layer,
                help="return logits, or log-probabilities with a negative log-likelihood loss",
            )


@rule("EM003", "unlogged-probabilities", "error")
def unlogged_probabilities(report: Report) -> Iterator[Hit]:
    """A negative log-likelihood reads probabilities where it expects their logarithms.

    What it finds: a loss inside the model (`nll_loss`) on the output of a softmax without a logarithm in between.

    Why it matters: the loss is then -r of the target, not -log r: it is bounded, and confident mistakes get next to no
    gradient.

    What to do: log_softmax before the loss, or cross-entropy on the logits.
    """
    for layer in report.layers:
        if "unlogged" in layer.flags:
            yield Hit(
                f"layer {layer.name}: a negative log-likelihood reads its probabilities, not their logarithms",
                layer,
                help="log_softmax before the loss, or cross-entropy on the logits",
            )
