"""What a model's saved configuration says about its loss: transformers' own table from heads to losses, nothing else.

transformers is looked at only where the model is one of its own, so it is imported already. Which loss a head gets is
taken from the framework (`loss_type`, `LOSS_MAPPING`, its tables from tasks to heads, `problem_type`); a loss that is
no cross-entropy over one axis of the scores, or over none that is certain, counts as none.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Name = Literal["cross-entropy", "bce", "none"]

# Tables of transformers from a model type to its head, and the loss that heads of the task get where the name of the
# class says nothing (GPT2LMHeadModel).
_TASKS = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "ForCausalLM"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "ForMaskedLM"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "ForConditionalGeneration"),
)


@dataclass(frozen=True)
class Declared:
    """The loss that a saved configuration names, and which output it is about.

    ``ranks``: dimensions that the scores may have; ``axis``: of the classes, from the right; ``classes``: how many the
    configuration names (None: not known); ``next_token``: labels may be the inputs themselves, one step early;
    ``spans``: the first two outputs are scores of a start and an end, over positions. ``by_labels``: labels that are no
    integers mean binary cross-entropy, as transformers takes them.
    """

    name: Name
    reason: str
    ranks: tuple[int, ...] = ()
    axis: int = -1
    classes: int | None = None
    next_token: bool = False
    spans: bool = False
    by_labels: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether scores of this shape are those that the configuration describes."""
        return len(shape) in self.ranks and self.classes in (None, shape[self.axis])


def declared(model: nn.Module) -> Declared | None:
    """Return what the configuration of a transformers model with a head says; None for any other model."""
    modeling = sys.modules.get("transformers.modeling_utils")
    base = getattr(modeling, "PreTrainedModel", None)
    if base is None or not isinstance(model, base):
        return None
    try:
        return _declared(model)
    except Exception:  # a configuration without the usual fields, or another version of the tables: it says nothing
        return None


def _declared(model: Any) -> Declared | None:
    from transformers.loss import loss_utils as losses

    kind, function = _loss(model, losses.LOSS_MAPPING)
    config, says = model.config, f"saved configuration: {kind} head"
    if function is None:
        return None
    if function is losses.ForCausalLMLoss or function is losses.ForMaskedLMLoss:
        shifted = function is losses.ForCausalLMLoss
        return Declared("cross-entropy", says, (3,), classes=_vocabulary(model), next_token=shifted)
    if function is losses.ForTokenClassification:
        return Declared("cross-entropy", says, (3,), classes=config.num_labels)
    if function is losses.ForSemanticSegmentationLoss:
        return Declared("cross-entropy", says, (4,), axis=-3, classes=config.num_labels)
    if function is losses.ForQuestionAnsweringLoss:
        return Declared("cross-entropy", says, (2,), spans=True)
    if function is losses.ForSequenceClassificationLoss:
        return _classification(config, kind)
    return Declared("none", f"saved configuration: {kind} head, whose loss is no cross-entropy over one axis")


def _loss(model: Any, table: dict[str, Any]) -> tuple[str, Any]:
    """Return the name of a head and its loss function; a function of the user's own is not known."""
    own = model.__dict__.get("_loss_function")
    kind = getattr(model, "loss_type", None)
    if own is None and kind is None:
        kind = _inherited(model, table)
    if own is not None:
        kind = next((name for name, known in table.items() if known is own), str(kind or "custom"))
    return str(kind), own if own is not None else table.get(kind) if kind is not None else None


def _inherited(model: Any, table: dict[str, Any]) -> str | None:
    """Return the loss of the head that a class was derived from, by transformers' own rule for the names of its heads,
    or of one that its tables of tasks list under the type of the configuration."""
    from transformers.models.auto import modeling_auto

    names = [base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    for name in names:
        found = re.findall(f"({'|'.join(table)})", name)
        if found:
            return str(found[0])
    for task, kind in _TASKS:
        heads = getattr(modeling_auto, task, {}).get(model.config.model_type)
        if set(names) & set(heads if isinstance(heads, list | tuple) else [heads]):
            return kind
    return None


def _vocabulary(model: Any) -> int | None:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor):
        return int(weight.shape[0])
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _classification(config: Any, kind: str) -> Declared:
    """One label per sample, several, or a number; without a problem type it is one label, as for integer labels."""
    problem, labels = config.problem_type, config.num_labels
    if problem == "regression" or (problem is None and labels == 1):
        what = "problem_type regression" if problem else "num_labels 1, a regression"
        return Declared("none", f"saved configuration: {what}")
    if problem == "multi_label_classification":
        return Declared("bce", f"saved configuration: problem_type {problem}", (2,), classes=labels)
    if problem == "single_label_classification":
        return Declared("cross-entropy", f"saved configuration: problem_type {problem}", (2,), classes=labels)
    says = f"saved configuration: {kind} head, {labels} labels and no problem_type"
    return Declared("cross-entropy", says, (2,), classes=labels, by_labels=True)


def aligned(targets: Tensor, inputs: list[Tensor], next_token: bool) -> Tensor | None:
    """Return the target of every score; None where it cannot be told.

    Where a model predicts the next token (N, T), labels are the tokens themselves, as transformers takes them, or were
    moved by one already: the inputs tell which. Both leave -100 where there is no target.
    """
    if not next_token:
        return targets
    if targets.dim() != 2 or targets.shape[1] < 2:
        return None
    named = targets >= 0
    for tokens in inputs:
        if tokens.shape != targets.shape or tokens.is_floating_point():
            continue
        tokens = tokens.to(targets.device)
        if bool(((tokens[:, 1:] == targets[:, :-1]) | ~named[:, :-1]).all()):
            return targets
        if bool(((tokens == targets) | ~named).all()):
            moved = targets.new_full(targets.shape, -100)
            moved[:, :-1] = targets[:, 1:]
            return moved
    return None
