"""Operators that need more than shapes, for a run without numbers: each says what it does with real integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emscan.shapeless.plausible import plausible_buffer
from emscan.shapeless.tensors import base_name, is_meta, is_shapeless, masked, masked_all, truth

if TYPE_CHECKING:
    from emscan.shapeless.mode import ShapelessMode

MOST = 1 << 24  # elements of a tensor that is kept real
_CPU = torch.device("cpu")
_LIKE_ANOTHER = ("expand_as", "view_as", "reshape_as")  # read no number of the other tensor
_CREATES = (
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty "
    "new_empty_strided"
).split()
_READS_INTEGERS = (
    "_pack_padded_sequence _pad_packed_sequence segment_reduce unique_dim unique_consecutive _unique2 histc"
).split()


@dataclass(frozen=True)
class Operation:
    """One call of an operator that meets numbers which nobody knows."""

    mode: ShapelessMode
    func: Any
    args: Any
    kwargs: Any

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place, or else by its name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)


Special = Callable[[Operation], Any]  # returns what the operator gives, or NotImplemented for the usual way
SPECIAL: dict[str, Special] = {}


def _special(*names: str) -> Callable[[Special], Special]:
    def register(function: Special) -> Special:
        for name in names:
            if name in SPECIAL:
                raise ValueError(f"{name} is registered twice")
            SPECIAL[name] = function
        return function

    return register


def check_counts(call: Operation) -> None:
    """Raise ValueError where an operator on integers is asked for more numbers than a real tensor may have here.

    Its size is an argument of its own, and on meta nobody could say more.
    """
    name = base_name(call.func)
    count: Any = 0
    if name == "one_hot":
        count = call.argument(1, "num_classes", -1) * call.args[0].numel()
    elif name in {"bincount", "histc"}:
        count = call.argument(2, "minlength", 0) if name == "bincount" else call.argument(1, "bins", 100)
    if isinstance(count, int) and count > MOST:
        raise ValueError(f"{name} was asked for {count:,} numbers")


@_special("_grouped_mm")
def _grouped_mm(call: Operation) -> Any:
    """On meta it takes one dtype and even strides only; on the CPU it takes every one."""
    a, b, ends = call.args[0], call.args[1], call.argument(2, "offs")
    if a.dim() == 2 and b.dim() == 2:
        shape = (ends.shape[0], a.shape[0], b.shape[1])
    else:
        groups = a.shape[:1] if a.dim() == b.dim() == 3 else ()
        shape = (*groups, a.shape[-2], b.shape[-1])
    return masked(torch.empty(shape, dtype=call.argument(4, "out_dtype") or a.dtype, device="meta"))


@_special(*_LIKE_ANOTHER)
def _like_another(call: Operation) -> Any:
    with truth():
        return masked_all(call.func(*call.args, **call.kwargs))


@_special(*_CREATES)
def _create(call: Operation) -> Any:
    """New tensors shaped like one without numbers have their own, unless they are too large."""
    if call.mode.too_large(call.func, call.args, call.kwargs):
        return NotImplemented
    return call.func(*call.args, **{**call.kwargs, "device": _CPU})


@_special("type_as", "to")
def _cast(call: Operation) -> Any:
    """A real tensor that is brought to the type and device of one without numbers stays real."""
    if is_shapeless(call.args[0]) or len(call.args) < 2 or not isinstance(call.args[1], Tensor):
        return NotImplemented
    return call.args[0].to(call.args[1].dtype)


@_special("item", "_local_scalar_dense")
def _item(call: Operation) -> Any:
    return torch.ones((), dtype=call.args[0].dtype).item()


@_special("is_nonzero")
def _is_nonzero(_: Operation) -> Any:
    return True


@_special("equal", "allclose")
def _equal(_: Operation) -> Any:
    return False


@_special("_assert_async", "_assert_tensor_metadata", "_functional_assert_async")
def _assertion(call: Operation) -> Any:
    return call.args[0] if call.func._schema.returns else None


@_special(*_READS_INTEGERS)
def _dense(call: Operation) -> Any:
    return call.mode.dense(call.func, call.args, call.kwargs)


def _integers(tensor: Tensor) -> Tensor:
    """Return truth values or integers that are real."""
    return plausible_buffer(tensor) if is_meta(tensor) else tensor


@_special("nonzero", "argwhere", "nonzero_numpy", "count_nonzero")
def _nonzero(call: Operation) -> Any:
    """No number that nobody knows is zero."""
    return call.func(torch.ones(call.args[0].shape, dtype=torch.bool), *call.args[1:], **call.kwargs)


@_special("masked_select")
def _masked_select(call: Operation) -> Any:
    source, mask = call.args
    chosen = torch.broadcast_to(_integers(mask), torch.broadcast_shapes(source.shape, mask.shape))
    return masked(torch.empty(int(chosen.sum()), dtype=source.dtype, device="meta"))


@_special("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")
def _index(call: Operation) -> Any:
    """Masks become the indices of what they let through: on meta nobody can count them."""
    indices: list[Any] = []
    for index in call.args[1]:
        if isinstance(index, Tensor) and index.dtype in {torch.bool, torch.uint8}:
            indices += _integers(index).nonzero(as_tuple=True)
        else:
            indices.append(index)
    return call.mode.without_numbers(call.func, (call.args[0], indices, *call.args[2:]), call.kwargs)


@_special("repeat_interleave")
def _repeat_interleave(call: Operation) -> Any:
    """The numbers of repetitions decide the length of the result."""
    source, repeats, dim = call.args[0], call.argument(1, "repeats"), call.argument(2, "dim")
    if not isinstance(repeats, Tensor):
        return NotImplemented
    with call.mode:
        source = source.flatten() if dim is None else source
        axis = dim or 0
        size = source.shape[axis]
        return source.index_select(axis, torch.arange(size).repeat_interleave(_integers(repeats).expand(size)))


@_special("tensor_split")
def _tensor_split(call: Operation) -> Any:
    if not isinstance(call.args[1], Tensor):
        return NotImplemented
    places = _integers(call.args[1]).tolist()
    with call.mode:
        return list(call.args[0].tensor_split(places, call.argument(2, "dim", 0)))
