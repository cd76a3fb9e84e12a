"""What the loader's second fence refuses in layers, told from their state alone, before any is built."""

from __future__ import annotations

from typing import Any

from emscan.inspect.walk import attributes, is_module
from emscan.load import allowlist
from emscan.load.calls import HINT, Global, Instance
from emscan.load.source import UnsafeError, printable


def check_objects(root: Any) -> None:
    """Raise UnsafeError where a layer carries hooks, replaces a method of its class, or holds a class or a stray layer."""
    pending, seen = [root], set[int]()
    while pending:
        item = pending.pop()
        if isinstance(item, Global) and item.name not in allowlist.functions() and item.name not in allowlist.dtypes():
            raise UnsafeError(f"it holds {printable(item.name, 80)}, which is no layer, tensor or plain value", HINT)
        if not isinstance(item, dict | list | tuple | Instance) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Instance):
            _check_layer(item)
            pending.extend(attributes(item).values())
        else:
            pending.extend(item.values() if isinstance(item, dict) else item)


def _check_layer(layer: Instance) -> None:
    kind = allowlist.layers().get(layer.kind)
    short = layer.kind.rpartition(".")[2]
    for name, value in attributes(layer).items():
        if kind is not None and hasattr(kind, name):
            raise UnsafeError(f"its {short} replaces {printable(name, 80)} of its class", HINT)
        if "_hooks" in name and value:
            raise UnsafeError(f"its {short} carries hooks ({printable(name, 80)}), which would run as code", HINT)
        if name != "_modules" and is_module(value):
            raise UnsafeError(f"its {short} holds a layer outside its list of layers", HINT)
