"""The trace as a graph: values, and the operator calls that made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class NotKeptError(RuntimeError):
    """A computation cannot be run again: an operand was too large to keep."""


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of the run. ``key`` names the computation that made it, the same for every batch; ``flow`` is the
    identity of the whole computation from the leaves on, within this run.

    ``param`` and ``data`` say whether a parameter and whether the input took part in its numbers;
    ``tensor`` is the number itself on the discovery batch, None where it would not fit the budget. ``missed``: somebody
    asked for it then.
    """

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: int
    call: Call | None = None
    index: int = 0
    flow: int = 0
    leaf: str | None = None  # "param" | "buffer" | "input" | "const"
    name: str = ""  # fully qualified name of a parameter or buffer, name of an input
    base_dim: int | None = None
    param: bool = False
    data: bool = False
    held: Tensor | None = None
    few: Tensor | None = None  # some of its entries, where the tensor was too large to keep
    dropped: bool = False
    missed: bool = False
    users: list[Call] = field(default_factory=list)

    @property
    def tensor(self) -> Tensor | None:
        """The numbers."""
        self.missed = self.missed or self.dropped
        return self.held

    @tensor.setter
    def tensor(self, numbers: Tensor | None) -> None:
        self.held = numbers

    @property
    def floating(self) -> bool:
        """Whether the value is of a floating-point (or complex) dtype."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __repr__(self) -> str:
        made = self.name or (self.call.op if self.call else self.leaf)
        return f"<{self.id} {made} {tuple(self.shape)}>"


@dataclass(eq=False, slots=True)
class Call:
    """One operator call. ``args`` and ``kwargs`` are the call's own, with every tensor replaced by its Value."""

    id: int
    op: str  # packet, e.g. "aten.softmax"; an in-place overload counts as its functional form
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    key: int
    module: str = ""
    where: str | None = None
    in_place: bool = False
    no_grad: bool = False
    excerpt: tuple[Tensor | None, ...] = ()  # what a row is verified by, where the operands were too large to keep

    def __hash__(self) -> int:
        return self.id  # sets of calls come in the same order in every run, and so do reports

    @property
    def out(self) -> Value:
        """The first output."""
        return self.outputs[0]

    def arg(self, name: str, default: Any = None) -> Any:
        """Return an argument by its schema name; the schema's default, then ``default``, where it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        if not hasattr(self.func, "_schema"):
            return default
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return argument.default_value if argument.has_default_value() else default
        return default

    def __repr__(self) -> str:
        return f"<{self.id} {self.op} {self.inputs} -> {self.outputs}>"


@dataclass(eq=False, slots=True)
class Trace:
    """One run: calls in order, the leaves they read, and the values that the model returned."""

    calls: list[Call] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    output_paths: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)  # fully qualified name -> class name, for display only
    live: set[int] = field(default_factory=set)  # ids of values that reach an output

    def mark_live(self) -> None:
        """Find the values that take part in what the model returned (all of them if it returned no tensor)."""
        if not self.outputs:
            self.live = {value.id for value in self.values}
            return
        stack = list(self.outputs)
        while stack:
            value = stack.pop()
            if value.id in self.live:
                continue
            self.live.add(value.id)
            if value.call is not None:
                stack.extend(value.call.inputs)

    def is_live(self, call: Call) -> bool:
        """Whether some output of ``call`` takes part in what the model returned."""
        return any(output.id in self.live for output in call.outputs)


def values_in(tree: Any) -> Iterator[Value]:
    """Yield the Values of a call's arguments in order."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from values_in(item)


def substitute(tree: Any, replace: Any) -> Any:
    """Return ``tree`` with ``replace(leaf)`` in place of every leaf; lists, tuples and dicts keep their form."""
    if isinstance(tree, tuple):
        return tuple(substitute(item, replace) for item in tree)
    if isinstance(tree, list):
        return [substitute(item, replace) for item in tree]
    if isinstance(tree, dict):
        return {key: substitute(item, replace) for key, item in tree.items()}
    return replace(tree)
