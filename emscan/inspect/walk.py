"""From the symbolic object of a pickle to names: tensors through nested containers and modules, modules with their class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from emscan.inspect.document import ModuleInfo
from emscan.inspect.lenient import Key
from emscan.load.calls import Instance, Tensor
from emscan.load.placeholders import Held
from emscan.load.source import RefusalError

_LONGEST_NAME = 4096  # the loader gives up there, too
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass
class Named:
    """A tensor under its dotted name. ``parameter``: whether a module has it as a parameter."""

    name: str
    tensor: Tensor
    parameter: bool


@dataclass
class Walk:
    """What an object holds, in its own order. ``objects``: whether there is any besides containers and plain values."""

    tensors: list[Named] = field(default_factory=list)
    modules: list[ModuleInfo] = field(default_factory=list)
    objects: bool = False


def walk(root: Any) -> Walk:
    """Return the tensors and modules in ``root``. Raises RefusalError where containers are nested too deep."""
    found = Walk()
    seen: set[int] = set()
    pending: list[tuple[str, Any, bool]] = [("", root, False)]
    while pending:
        name, item, parameter = pending.pop()
        if isinstance(item, Tensor):
            found.tensors.append(Named(name, item, parameter))
            continue
        if not isinstance(item, dict | list | tuple | Instance) or id(item) in seen:
            continue
        seen.add(id(item))  # a container can hold itself
        found.objects = found.objects or isinstance(item, Instance)
        if isinstance(item, Instance) and is_module(item):
            found.modules.append(ModuleInfo(name, item.kind))
        inner = list(_inside(item))
        for key, value, is_parameter in reversed(inner):
            full = f"{name}.{key}" if name and key else name or key
            if len(full) > _LONGEST_NAME:
                raise RefusalError("its dicts are nested too deep", "save a module or its state_dict")
            pending.append((full, value, is_parameter))
    return found


def is_module(item: Any) -> bool:
    """Whether an object is a module, by the state that every nn.Module has, or of TorchScript."""
    if not isinstance(item, Instance):
        return False
    state = attributes(item)
    return item.kind.startswith("__torch__.") or all(isinstance(state.get(table), dict) for table in _TABLES)


def attributes(item: Instance) -> dict[Any, Any]:
    """Return the attributes that BUILD gives an object; slots come as the second of two dicts."""
    state = item.state
    if type(state) is tuple and len(state) == 2:
        return {**(state[0] if isinstance(state[0], dict) else {}), **(state[1] if isinstance(state[1], dict) else {})}
    return state if isinstance(state, dict) else {}


def _inside(item: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield key, value and whether the value is a parameter, of what a container or an object holds."""
    if isinstance(item, dict):
        for key, value in item.items():
            yield _text(key), value, False
    elif isinstance(item, list | tuple):
        for index, value in enumerate(item):
            yield str(index), value, False
    else:
        yield from _held(item)


def _held(item: Instance) -> Iterator[tuple[str, Any, bool]]:
    state = attributes(item)
    tables = [table for table in _TABLES if isinstance(state.get(table), dict)]
    for table in tables:
        for key, value in state[table].items():
            yield _text(key), value, table == "_parameters"
    for key, value in state.items():
        # Private attributes of modules are torch's own caches: `_flat_weights` holds the parameters once more.
        if key not in tables and not (tables and _text(key).startswith("_")):
            yield _text(key), value, False
    if isinstance(item, Held):
        for key, value in item.items.items():
            yield _text(key), value, False
        for index, value in enumerate((*item.arguments, *item.values)):
            yield str(index), value, False


def _text(key: Any) -> str:
    """Return a key as part of a name."""
    if type(key) is Key or (type(key) is int and key.bit_length() > 128):  # the digits of a long number take long
        return f"<{type(getattr(key, 'value', key)).__name__.lower()}>"
    return str(key)
