"""Tensors without numbers: torch's meta tensors that say they are on the CPU, and real ones that were written by them.

A model asks where its weights are and makes its masks and positions there; these must come out real. So a meta
tensor that a model sees has a class whose ``device`` is the CPU. The class is put on the tensor itself and taken off
again: identity, storage and views stay torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CPU = torch.device("cpu")
# torch's own descriptors, which the properties below stand before
_DEVICE: Any = Tensor.device
_IS_META: Any = Tensor.is_meta
_DATA: Any = Tensor.data
_MARK = "_emscan_shapeless"
_truth = 0  # greater than 0 while torch's own code runs, which must see the device as it is


class Shapeless(Tensor):
    """A meta tensor as a model sees it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the model is told."""
        found: torch.device = _DEVICE.__get__(self) if _truth else _CPU
        return found

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """What the model is told."""
        return bool(_truth)

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """What the model is told."""
        return not _truth

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        return masked(_DATA.__get__(self))

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:  # type: ignore[override]
        """Return a real tensor of ``data``, as on the CPU."""
        return torch.tensor(data, dtype=dtype or self.dtype, requires_grad=requires_grad)

    def data_ptr(self) -> int:
        """Return an address of its own: parameters that share one are taken to be tied."""
        return int(self.untyped_storage()._cdata) + int(self.storage_offset()) * self.element_size()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"tensor(shape={tuple(self.shape)}, dtype={self.dtype}, without numbers)"

    def tolist(self) -> Any:
        """Return ones, for code that goes on with numbers."""
        return torch.ones(self.shape, dtype=self.dtype).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return ones, for code that goes on with numbers."""
        return torch.ones(self.shape, dtype=self.dtype).numpy()


@functools.cache
def _masking(kind: type[Tensor]) -> Any:
    """Return the class that a tensor of class ``kind`` gets."""
    if kind is Tensor:
        return Shapeless
    return type(f"Shapeless{kind.__name__}", (Shapeless, kind), {"_emscan_kind": kind})


def masked(tensor: Tensor) -> Tensor:
    """Put the class on a meta tensor, and return it."""
    if not isinstance(tensor, Shapeless):
        tensor.__class__ = _masking(type(tensor))
    return tensor


def unmasked(tensor: Tensor) -> Tensor:
    """Take the class off again."""
    if isinstance(tensor, Shapeless):
        object.__setattr__(tensor, "__class__", vars(type(tensor)).get("_emscan_kind", Tensor))
    return tensor


def masked_all(out: Any) -> Any:
    """Put the class on all meta tensors among an operator's outputs, and return these."""
    for tensor in tensors_in([out]):
        if is_meta(tensor):
            masked(tensor)
    return out


@contextmanager
def truth() -> Iterator[None]:
    """Run torch's own code, which sees that these tensors are on the meta device."""
    global _truth
    _truth += 1
    try:
        yield
    finally:
        _truth -= 1


def is_meta(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, whatever it says."""
    return bool(_IS_META.__get__(tensor))


def mark(tensor: Tensor) -> None:
    """Remember that numbers which nobody knows were written into the memory of a real tensor."""
    setattr(tensor.untyped_storage(), _MARK, True)


def is_shapeless(tensor: Tensor) -> bool:
    """Whether nobody knows the numbers of a tensor."""
    if is_meta(tensor):
        return True
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return False
    return getattr(tensor.untyped_storage(), _MARK, False)


def on_meta(tensor: Tensor) -> Tensor:
    """Return a meta tensor of the same shape, strides and type."""
    if tensor.layout != torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def tensors_in(tree: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or outputs, in order."""
    for item in tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from tensors_in(item)


def placed(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield every tensor that a module holds under a name: the mapping, the name there, the tensor."""
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, value in table.items():
                if isinstance(value, Tensor):
                    yield table, name, value


@functools.lru_cache(maxsize=4096)
def base_name(func: Any) -> str:
    """Return the operator's name without namespace and overload; in-place operators without their underscore."""
    name = func._schema.name.partition("::")[2]
    return str(name.rstrip("_") or name)
