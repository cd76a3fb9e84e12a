"""One dispatch mode that runs a model whose weights have no numbers.

Integers, truth values and whatever else does not come from the weights are real. An operator that meets a number
nobody knows runs on the meta device, its real operands converted for the call; integers that come out of it are made
up (`plausible`). Other modes may lie above this one: they see the operators as the model calls them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emscan.shapeless.plausible import plausible
from emscan.shapeless.special import MOST, SPECIAL, Operation, check_counts
from emscan.shapeless.tensors import (
    base_name,
    is_meta,
    is_shapeless,
    mark,
    masked,
    masked_all,
    on_meta,
    tensors_in,
    truth,
)

MOST_WHILE_BUILDING = 1 << 20  # and of a floating-point one that may be a weight
DENSE = 1 << 22  # and of one that is filled with ones for an operator that cannot do without numbers

_META = torch.device("meta")
_CPU = torch.device("cpu")


@functools.lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    """Whether all outputs are views of an input that is not written to, or the call only changes how self is seen."""
    returns = func._schema.returns
    viewed = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return viewed or torch.Tag.inplace_view in func.tags


@functools.lru_cache(maxsize=4096)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@functools.lru_cache(maxsize=4096)
def _device_place(func: Any) -> int | None:
    return next((i for i, a in enumerate(func._schema.arguments) if a.name == "device"), None)


class ShapelessMode(TorchDispatchMode):
    """Runs operators on tensors whose numbers nobody knows."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler for the sake of this mode: 800 modules, 70 MiB and seconds."""
        return False

    supports_higher_order_operators = True

    def __init__(self, most: int = MOST) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = most  # elements of a floating-point tensor that is kept real
        self._known: dict[Any, Any] = {}  # layers repeat: what a call gives on meta, by its arguments' shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):  # a higher-order operator
            with truth():
                return func(*args, **kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if not any(is_shapeless(tensor) for tensor in tensors):
            return self._real(func, args, kwargs)
        special = SPECIAL.get(base_name(func))
        if special is not None:
            found = special(Operation(self, func, args, kwargs))
            if found is not NotImplemented:
                return found
        if _is_view(func) and is_shapeless(args[0]) and _device_place(func) is None:
            with truth():
                out = func(*args, **kwargs)
            cast = is_meta(args[0]) and args[0].is_floating_point()  # to integers, which must be real
            return self._outputs(func, out, {}, args, kwargs) if cast else masked_all(out)
        return self.without_numbers(func, args, kwargs)

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that meets no shapeless number, unless what it makes would be too large to be real."""
        args, kwargs = _on_device(func, args, kwargs, _CPU, only_from_meta=True)
        makes = bool(func._schema.returns) and not _is_view(func) and not _written(func)
        if makes and self.too_large(func, args, kwargs):
            return self.without_numbers(func, args, kwargs)
        return func(*args, **kwargs)

    def too_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether what an operator makes has more elements than a real tensor may have here."""
        check_counts(Operation(self, func, args, kwargs))
        try:
            out = self._on_meta(func, args, kwargs, {})
        except Exception:  # an operator without a meta kernel, or one that raises for good reasons: as it would
            return False
        return any(t.numel() > (self._most if t.is_floating_point() else MOST) for t in tensors_in([out]))

    def without_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on the meta device; real tensors that it writes to are marked."""
        written = [
            tensor
            for place, name in _written(func)
            for tensor in tensors_in([args[place] if place < len(args) else kwargs.get(name)])
        ]
        twins: dict[int, Tensor] = {}
        try:
            out = self._on_meta(func, args, kwargs, twins)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return self._otherwise(func, args, kwargs, error)
        originals = {id(twin): tensor for tensor in written if (twin := twins.get(id(tensor))) is not None}
        for tensor in written:
            if not is_meta(tensor) and tensor.is_floating_point():
                mark(tensor)
        return self._outputs(func, out, originals, args, kwargs)

    def _on_meta(self, func: Any, args: Any, kwargs: Any, twins: dict[int, Tensor]) -> Any:
        """Call on meta, or make again what the same call made before."""
        key = None if _is_view(func) or _written(func) else _key(func, args, kwargs)
        if key is None:
            return _call_on_meta(func, args, kwargs, twins)
        known = self._known.get(key)
        if known is None:
            out = _call_on_meta(func, args, kwargs, twins)
            known = self._known[key] = _recipe(out, {id(t) for t in tensors_in([args, [*kwargs.values()]])})
            return out
        return _call_on_meta(func, args, kwargs, twins) if known is NotImplemented else _made(known)

    def _outputs(self, func: Any, out: Any, originals: dict[int, Tensor], args: Any, kwargs: Any) -> Any:
        arguments: dict[str, Any] | None = None

        def finish(item: Any) -> Any:
            nonlocal arguments
            if isinstance(item, list | tuple):
                return type(item)(finish(part) for part in item) if type(item) in {list, tuple} else item
            if not isinstance(item, Tensor):
                return item
            if id(item) in originals:
                return originals[id(item)]
            if not is_meta(item):
                return item
            if item.is_floating_point() or item.is_complex() or item.numel() > MOST:
                return masked(item)
            arguments = arguments if arguments is not None else named_arguments(func, args, kwargs)
            return plausible(base_name(func), item, arguments)

        return finish(out)

    def _otherwise(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """An operator that fails on meta: step by step where it is made of others, else on ones."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if _written(func) or sum(tensor.numel() for tensor in tensors) > DENSE:
            raise error
        return self.dense(func, args, kwargs)

    def dense(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on ones in place of what has no numbers; keep the shapes of what comes out."""

        def filled(item: Any) -> Any:
            if isinstance(item, Tensor):
                return torch.ones(item.shape, dtype=item.dtype) if is_shapeless(item) else item
            if isinstance(item, list | tuple):
                return type(item)(filled(part) for part in item)
            return item

        def emptied(item: Any) -> Any:
            if isinstance(item, Tensor):
                return masked(on_meta(item)) if item.is_floating_point() or item.is_complex() else item
            if isinstance(item, list | tuple):
                return type(item)(emptied(part) for part in item)
            return item

        args, kwargs = _on_device(func, args, kwargs, _CPU, only_from_meta=True)
        return emptied(func(*filled(args), **{name: filled(item) for name, item in kwargs.items()}))


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what decides the shapes of a call's outputs, None where that cannot be said."""

    def describe(item: Any) -> Any:
        if isinstance(item, Tensor):
            if item.layout != torch.strided:
                raise TypeError
            return item.shape, item.stride(), item.dtype
        if isinstance(item, list | tuple):
            return tuple([describe(part) for part in item])
        return type(item), item

    try:
        key = func, describe(args), describe([*kwargs.items()])
        hash(key)
    except TypeError:  # something that has no hash
        return None
    return key


def _recipe(out: Any, inputs: set[int]) -> Any:
    """Return how to make an operator's outputs again; NotImplemented where they are no tensors of their own."""
    if isinstance(out, Tensor):
        fresh = id(out) not in inputs and out.layout == torch.strided and is_meta(out)
        return (out.shape, out.stride(), out.dtype) if fresh else NotImplemented
    if isinstance(out, list | tuple) and type(out) in {list, tuple}:
        parts = [_recipe(part, inputs) for part in out]
        return NotImplemented if NotImplemented in parts else (type(out), parts)
    return NotImplemented


def _made(recipe: Any) -> Any:
    if isinstance(recipe[0], type):
        return recipe[0](_made(part) for part in recipe[1])
    shape, stride, dtype = recipe
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _call_on_meta(func: Any, args: Any, kwargs: Any, twins: dict[int, Tensor] | None = None) -> Any:
    """Call with every tensor on meta; ``twins`` gets, by the identity of a real tensor, what stood for it."""
    known = twins if twins is not None else {}

    def convert(item: Any) -> Any:
        if isinstance(item, Tensor):
            if is_meta(item):
                return item
            if id(item) not in known:
                known[id(item)] = on_meta(item)
            return known[id(item)]
        if isinstance(item, list | tuple):
            return type(item)(convert(part) for part in item)
        return item

    args, kwargs = _on_device(func, args, kwargs, _META)
    with truth():
        return func(*convert(args), **{name: convert(item) for name, item in kwargs.items() if name != "generator"})


def _on_device(
    func: Any, args: Any, kwargs: Any, device: torch.device, *, only_from_meta: bool = False
) -> tuple[Any, Any]:
    """Return the arguments with the device that the operator is asked to put its result on replaced."""
    place = _device_place(func)
    if place is None:
        return args, kwargs
    given = args[place] if place < len(args) else kwargs.get("device")
    if only_from_meta and (given is None or torch.device(given).type != "meta"):
        return args, kwargs
    if place < len(args):
        return (*args[:place], device, *args[place + 1 :]), kwargs
    if only_from_meta or given is not None or not next(tensors_in(args), None):
        return args, {**kwargs, "device": device}
    return args, kwargs


def named_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    found: dict[str, Any] = {}
    for place, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = args[place] if place < len(args) else kwargs.get(argument.name, default)
    return found
