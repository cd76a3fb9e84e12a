"""Count competition-like operator calls on what depends on a parameter, independently of emscan.

Own bookkeeping: a set of tensors and of storages that hold something computed from a parameter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAMILIES = {
    "softmax": "softmax _softmax _safe_softmax log_softmax _log_softmax special_softmax special_log_softmax logsumexp "
    "special_logsumexp logcumsumexp",
    "attention": "scaled_dot_product_attention",
    "two-way": "sigmoid tanh softplus log_sigmoid silu mish special_expit logaddexp logaddexp2 glu",
    "gelu": "gelu erf special_erf erfc",
    "threshold": "relu relu6 hardtanh hardsigmoid hardswish leaky_relu elu celu selu threshold hardshrink softshrink "
    "rrelu prelu clamp clamp_min clamp_max clip",
    "extremum": "max min amax amin argmax argmin aminmax cummax cummin maximum minimum fmax fmin max_pool1d max_pool2d "
    "max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d",
    "ranking": "topk sort argsort kthvalue",
    "recurrent": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
}
# Their second tensor gives a dtype or a shape, no number.
_LIKE_ANOTHER = frozenset({"aten.type_as", "aten.expand_as", "aten.view_as", "aten.reshape_as"})
COUNTED = frozenset(f"aten.{name}" for names in FAMILIES.values() for name in names.split())


def functional_name(func: Any) -> str:
    """Return ``namespace.operator`` without overload; an in-place operator goes by its functional name."""
    namespace, _, name = func._schema.name.partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return f"{namespace}.{name}"


class OperatorCount(TorchDispatchMode):
    """Counts, per operator, its calls on floating-point values that depend on a parameter of ``model``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._alive: list[Tensor] = []  # an id or a storage must not be handed out again
        self._tensors: set[int] = set()
        self._storages: set[int] = set()
        for parameter in model.parameters():
            self._mark(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = functional_name(func)
        read = leaves[:1] if name in _LIKE_ANOTHER or func._overloadname == "other" else leaves
        dependent = [leaf for leaf in read if self._depends(leaf)]
        if name in COUNTED and any(leaf.is_floating_point() for leaf in dependent):
            self.counts[name] += 1
        out = func(*args, **kwargs)
        if dependent and not _creates(func):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._mark(leaf)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for leaf in tree_leaves(value):
                        if isinstance(leaf, Tensor):
                            self._mark(leaf)
        return out

    def _mark(self, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self._tensors.add(id(tensor))
        if tensor.layout == torch.strided and tensor.numel():
            self._storages.add(tensor.untyped_storage()._cdata)

    def _depends(self, tensor: Tensor) -> bool:
        if id(tensor) in self._tensors:
            return True
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages


def _creates(func: Any) -> bool:
    """Whether the output holds no number of the inputs: factories that copy a shape alone."""
    name = func._schema.name.partition("::")[2].removesuffix("_")
    return name.endswith("_like") or name.startswith("new_") or name in {"size", "sym_size", "zero", "fill"}


def count(model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    """Return the counts of one run in inference mode, with torch's fused encoder layer switched off as emscan does."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    mode = OperatorCount(model)
    try:
        with torch.inference_mode(), mode:
            model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return mode.counts
