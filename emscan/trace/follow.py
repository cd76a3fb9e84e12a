"""Measurement passes: follow the names of computations through a batch and hand out the tensors that were asked for."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from emscan.trace.dispatch import Tracker, module_stack, packet_name, tensors_in
from emscan.trace.grad import without_gradients
from emscan.trace.graph import Trace, Value, substitute
from emscan.trace.leaves import Leaves
from emscan.trace.record import named_inputs

ValueTap = Callable[[Tensor], None]
CallTap = Callable[[dict[str, Any], Any], None]


@dataclass
class Tap:
    """One listener. ``asked``: how many computations of the name it wants; ``period``: it hears every n-th of them,
    where a model computes the same thing n times over."""

    listen: Callable[..., None]
    asked: int = 1
    period: int = 1


@dataclass
class Taps:
    """What to hand out: tensors by the key of their computation, calls by theirs; ``known``: all keys seen so far.

    ``role`` names a listener: asking again for the same key means that the name has one more computation to hear.
    """

    values: dict[int, dict[object, Tap]] = field(default_factory=dict)
    calls: dict[int, dict[object, Tap]] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)

    def on_value(self, key: int, role: object, listen: ValueTap) -> None:
        """Ask for the tensor of a computation named ``key``."""
        _ask(self.values.setdefault(key, {}), role, listen)

    def on_call(self, key: int, role: object, listen: CallTap) -> None:
        """Ask for arguments (by schema name) and output of a call named ``key``."""
        _ask(self.calls.setdefault(key, {}), role, listen)

    def settle(self, trace: Trace) -> None:
        """Find how often each name is computed per one that is wanted; call after all have asked."""
        values = Counter(value.key for value in trace.values if value.call is not None)
        calls = Counter(call.key for call in trace.calls)
        for taps, made in ((self.values, values), (self.calls, calls)):
            for key, roles in taps.items():
                for tap in roles.values():
                    if key in made:
                        tap.period = max(1, made[key] // tap.asked)


def _ask(roles: dict[object, Tap], role: object, listen: Callable[..., None]) -> None:
    if role in roles:
        roles[role].asked += 1
    else:
        roles[role] = Tap(listen)


class _Turns:
    """Who hears the n-th computation of a name."""

    def __init__(self) -> None:
        self._fired: Counter[tuple[str, int]] = Counter()

    def hand_out(self, kind: str, key: int, taps: dict[object, Tap], *what: Any) -> None:
        """Let the taps on a name hear its next computation."""
        turn = self._fired[kind, key]
        self._fired[kind, key] += 1
        if any(tensor.is_mkldnn for tensor in tensors_in(list(what))):
            what = substitute(
                what, lambda leaf: leaf.to_dense() if isinstance(leaf, Tensor) and leaf.is_mkldnn else leaf
            )
        for tap in taps.values():
            if turn % tap.period == 0:
                tap.listen(*what)


class Follower(Tracker):
    """One pass that feeds taps. ``unseen`` collects competition-like operators in a computation not seen before."""

    def __init__(self, leaves: Leaves, taps: Taps, watched: frozenset[str]) -> None:
        super().__init__(leaves)
        self._taps, self._watched = taps, watched
        self._turns = _Turns()
        self.unseen: set[str] = set()

    def before(self, func: Any, key: int, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """Keep the arguments of a call that is asked for, before an in-place operator changes them."""
        if key not in self._taps.known:
            name = packet_name(func)
            if name in self._watched and any(t.is_floating_point() for t in inputs):
                self.unseen.add(name)
        if key not in self._taps.calls:
            return None
        named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
        return {**named, **kwargs}

    def after(self, call: Any, func: Any, key: int, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Feed the taps of this call and of its outputs."""
        if call is not None:
            out = outputs[0] if len(outputs) == 1 or _gives_one(func) else outputs  # a kernel may hand out more
            self._turns.hand_out("call", key, self._taps.calls[key], call, out)
        for index, tensor in enumerate(outputs):
            name = hash((key, index)) if index else key
            taps = self._taps.values.get(name)
            if taps:
                self._turns.hand_out("value", name, taps, tensor)

    def feed_inputs(self, inputs: dict[str, Tensor]) -> None:
        """Feed taps on the inputs themselves."""
        for tensor in inputs.values():
            key = self.key_of(tensor)
            self._turns.hand_out("value", key, self._taps.values.get(key, {}), tensor)


@functools.lru_cache(maxsize=4096)
def _gives_one(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "Tensor"


def follow(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], taps: Taps, watched: frozenset[str]
) -> tuple[list[Tensor], set[str]]:
    """Run one batch under the taps; return the model's output tensors and the operators in unseen computations."""
    inputs = named_inputs(args, kwargs)
    with module_stack(model), without_gradients(model):
        follower = Follower(Leaves(model, inputs), taps, watched)
        follower.feed_inputs(inputs)
        with follower:
            out = model(*args, **kwargs)
    return list(tensors_in(out)), follower.unseen


def feed(trace: Trace, taps: Taps) -> bool:
    """Hand out what a recorded run has kept, as `follow` would on the same batch, so that it need not run again.

    Return False, with nothing handed out, where something that is asked for was too large to keep.
    """
    heard: list[tuple[str, int, dict[object, Tap], tuple[Any, ...]]] = []
    for value in trace.inputs:
        if value.key in taps.values:
            heard.append(("value", value.key, taps.values[value.key], (value,)))
    for call in trace.calls:
        if call.func is None or call.op == "emscan.mutated":
            continue  # no operator: `follow` does not come by
        if call.key in taps.calls:
            named = {a.name: value for a, value in zip(call.func._schema.arguments, call.args, strict=False)}
            single = len(call.outputs) == 1 or _gives_one(call.func)
            out = call.outputs[0] if single else call.outputs
            heard.append(("call", call.key, taps.calls[call.key], ({**named, **call.kwargs}, out)))
        for output in call.outputs:
            if output.key in taps.values:
                heard.append(("value", output.key, taps.values[output.key], (output,)))
    whole = [(kind, key, roles, substitute(what, _kept)) for kind, key, roles, what in heard]
    if any(leaf is _GONE for _, _, _, what in whole for leaf in _leaves(what)):
        return False
    turns = _Turns()
    for kind, key, roles, what in whole:
        turns.hand_out(kind, key, roles, *what)
    return True


_GONE = object()


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, Value):
        return leaf.held if leaf.held is not None else _GONE
    return leaf


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree
