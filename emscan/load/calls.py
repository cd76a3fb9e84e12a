"""The few calls that rebuilding a model needs, each with the check of its arguments; every other call is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from emscan.load import allowlist
from emscan.load.source import RefusalError, UnsafeError, printable

HINT = (
    "save its weights alone (model.state_dict()) and name the architecture with --model, or pass --trust if you "
    "trust where the file comes from"
)
DAMAGED = "the file is damaged: copy or save it again"
SCALARS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True)
class Global:
    """A name that unpickling would import."""

    name: str


@dataclass(eq=False)
class Instance:
    """A layer that NEWOBJ makes without running its constructor; ``built`` once BUILD has given it its ``state``."""

    kind: str
    built: bool = False
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """``size`` bytes that the file has, read as items of ``item`` bytes, and by which name the file keeps them."""

    size: int
    item: int
    kind: str = ""  # the class that says the dtype, e.g. torch.FloatStorage
    key: str = ""


class Value:
    """Something finished that may be held and no longer changed: a size, a device, a set."""


@dataclass(eq=False)
class Tensor(Value):
    """A rebuilt tensor or parameter: a view of ``storage``, ``offset`` and ``stride`` in items of ``item`` bytes.

    ``dtype``: torch's name for it, or "" where that of the storage holds. ``trained``: it requires a gradient.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    item: int
    dtype: str = ""
    trained: bool = False

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Ordered(dict[Any, Any]):
    """A collections.OrderedDict."""


@dataclass
class Limits:
    """``budget``: the most bytes that one tensor may present, however few bytes it is a view of.

    ``hooks``: containers of hooks met so far, which must still be empty when the pickle ends.
    """

    budget: int
    hooks: list[Any] = field(default_factory=list)


def refuse(reason: str) -> NoReturn:
    """Raise UnsafeError."""
    raise UnsafeError(reason, HINT)


def plain_key(key: Any) -> Any:
    """Return a key that is cheap to hash: nested tuples can take exponential time."""
    flat = key if type(key) is tuple else (key,)
    if not all(type(part) in SCALARS for part in flat):
        refuse("it has a dict or set with keys that are no plain values")
    return key


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 64 or not all(type(size) is int and size >= 0 for size in value):
        refuse("it has a tensor whose shape is no short tuple of sizes")
    return value


def _tensor(
    limits: Limits,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    *,
    item: int | None = None,
    dtype: str = "",
) -> Tensor:
    """Check that a tensor lies within its storage; expanded dimensions (stride 0) may not dwarf the file."""
    size, stride = _sizes(size), _sizes(stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or type(requires_grad) is not bool:
        refuse("it would rebuild a tensor from something that is no tensor's data")
    (offset,) = _sizes((offset,))
    if metadata is not None and (type(metadata) is not dict or not {*metadata} <= {"conj", "neg"}):
        refuse("it has a tensor with unknown metadata")
    item = storage.item if item is None else item
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    if count and (last + 1) * item > storage.size:
        raise RefusalError("it has a tensor that reaches beyond its data", DAMAGED)
    if count * item > limits.budget:
        raise RefusalError(
            f"it has a tensor of shape {printable(size, 80)} that repeats far less data",
            "save a copy that is contiguous",
        )
    limits.hooks.append(hooks)
    return Tensor(storage, offset, size, stride, item, dtype, requires_grad)


def _tensor_of_type(
    limits: Limits, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    name = dtype.name if isinstance(dtype, Global) else ""
    item = allowlist.dtypes().get(name)
    if item is None or len(rest) > 1:
        refuse("it has a tensor of an unknown type")
    return _tensor(limits, storage, offset, size, stride, grad, hooks, *rest, item=item, dtype=name)


def _parameter(limits: Limits, data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Tensor:
    if not isinstance(data, Tensor) or type(requires_grad) is not bool:
        refuse("it has a parameter that is no tensor")
    limits.hooks.append(hooks)
    _attributes(state)
    return data


def _attributes(state: Any) -> None:
    """Allow attributes that a user may have set on a tensor, none that a tensor has of its own."""
    if state is not None and type(state) is not dict:
        refuse("it has a tensor with a state that is no plain dict")
    reserved = [key for key in state or () if type(key) is not str or key.startswith("__") or key in _tensor_names()]
    if reserved:
        refuse(f"it would replace the attribute {printable(reserved[0], 80)} of a tensor")


def _typed(limits: Limits, function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """Check a tensor with attributes: the rebuild function, Tensor or Parameter, its arguments, the attributes."""
    name = function.name if isinstance(function, Global) else ""
    target = kind.name if isinstance(kind, Global) else ""
    if not name.startswith("torch._utils._rebuild_tensor") or target not in TENSOR_TYPES:
        refuse("it has a tensor of a class that is not torch's own")
    _attributes(state)
    tensor = CALLS[name](limits, *arguments)
    assert isinstance(tensor, Tensor)
    return tensor


def _set_of(_limits: Limits, *arguments: Any) -> Value:
    for values in arguments:
        if type(values) is not list and type(values) is not tuple:
            refuse("it would make a set of something that is no list")
        for value in values:
            plain_key(value)
    return Value()


def _of_scalars(_limits: Limits, *arguments: Any) -> Value:
    """Check a call whose arguments are a few plain values or one tuple of sizes."""
    for value in arguments:
        if type(value) not in SCALARS:
            _sizes(value)
    return Value()


def _ordered(_limits: Limits, *arguments: Any) -> Ordered:
    if arguments:
        refuse("it would fill an OrderedDict in a call, as Python 2 did")
    return Ordered()


def _encoded(_limits: Limits, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        refuse("it would encode text in a way that pickle does not")
    return text.encode("latin1")


# Each check takes the arguments that the file gives and returns the symbol that stands for the result.
CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encoded,
    "builtins.complex": _of_scalars,
    "builtins.set": _set_of,
    "collections.OrderedDict": _ordered,
    "torch.Size": _of_scalars,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch.device": _of_scalars,
}
TENSOR_TYPES = frozenset({"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"})


@functools.cache
def _tensor_names() -> frozenset[str]:
    import torch

    return frozenset(dir(torch.nn.Parameter))
