"""Elementwise regions: stretches of entry-by-entry arithmetic on one computed value.

Inside a region every entry of the result is a function of the same entry of one *base*, whatever the spelling;
constants, masks and values made of parameters alone count as constants of that function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emscan.classify.owners import bias_of
from emscan.trace.graph import Call, NotKeptError, Trace, Value, substitute
from emscan.trace.operators import PASS, pointwise
from emscan.trace.origins import is_binary_extremum

# Operators whose curve has a corner or a step.
KINKED = frozenset(
    f"aten.{name}"
    for name in (
        "relu relu6 hardtanh hardsigmoid hardswish leaky_relu elu celu selu threshold hardshrink softshrink rrelu prelu "
        "clamp clamp_min clamp_max clip maximum minimum fmax fmin max min where masked_fill abs absolute sign sgn "
        "heaviside gt ge lt le greater less greater_equal less_equal index_put round floor ceil trunc frac fmod "
        "remainder eq ne nan_to_num"
    ).split()
)
# Operators that only scale, shift, compare for equality with nothing, or pass on.
_AFFINE = (
    frozenset(f"aten.{name}" for name in "add sub rsub mul div neg negative multiply divide subtract".split()) | PASS
)
_UNIT_SCALES = frozenset(f"aten.{name}" for name in "add sub mul multiply div divide subtract".split())
CLAMPS = frozenset(f"aten.{name}" for name in "clamp clamp_min clamp_max clip maximum minimum max min".split())


@dataclass
class Region:
    """Calls that lead from ``base`` to ``end``, in order."""

    base: Value
    end: Value
    calls: list[Call]

    @property
    def kinked(self) -> bool:
        """Whether some call has a corner."""
        return any(call.op in KINKED for call in self.calls)

    @property
    def nonlinear(self) -> bool:
        """Whether some call is more than scaling and shifting by constants."""
        return any(call.op not in _AFFINE or _many_variables(call) for call in self.calls)

    def function(self, *, skip: frozenset[str] = frozenset()) -> Callable[[Tensor], Tensor]:
        """Return the region as a function of float64 energies; operators named in ``skip`` pass their input on.

        A constant that differs between units is taken at its median.
        """

        places = {self.base.id: 0, **{call.out.id: n + 1 for n, call in enumerate(self.calls)}}
        steps = [_step(call, places, skip) for call in self.calls]
        last = places[self.end.id]

        def run(z: Tensor) -> Tensor:
            known = [z]
            for step in steps:
                known.append(step(known))
            return known[last]

        return run

    def replay(self, z: Tensor) -> Tensor:
        """Run the region's own operators on ``z``, a tensor shaped like the base, with the model's own constants."""
        known: dict[int, Tensor] = {self.base.id: z}
        for call in self.calls:
            args = substitute(call.args, lambda leaf: _own(leaf, known))
            kwargs = substitute(call.kwargs, lambda leaf: _own(leaf, known))
            if call.in_place:
                args = (args[0].clone(), *args[1:])
            known[call.out.id] = call.func(*args, **kwargs)
        return known[self.end.id]

    def signature(self) -> tuple[object, ...]:
        """Return what determines the function: operators, plain arguments, constants, and what uses the results."""
        places = {self.base.id: 0, **{call.out.id: n + 1 for n, call in enumerate(self.calls)}}

        def name(leaf: object) -> object:
            if not isinstance(leaf, Value):
                return leaf if isinstance(leaf, int | float | bool | str | type(None)) else repr(leaf)
            if leaf.id in places:
                return "value", places[leaf.id]
            return "constant", float(_representative(leaf)), _uniform(leaf.tensor) if leaf.tensor is not None else None

        parts = [(c.func, _frozen(substitute(c.args, name)), _frozen(substitute(c.kwargs, name))) for c in self.calls]
        guards = tuple(len(call.out.users) == 1 and call.out.users[0].op for call in self.calls)
        return (*parts, guards, self.base.dtype)

    @property
    def scalar(self) -> bool:
        """Whether the same function holds for every entry: no constant differs between units."""
        inside = {self.base.id, *(call.out.id for call in self.calls)}
        outside = [v for call in self.calls for v in call.inputs if v.id not in inside]
        return all(_uniform(v.tensor) if v.tensor is not None else math.prod(v.shape) <= 1 for v in outside)


def _frozen(tree: object) -> object:
    if isinstance(tree, list | tuple):
        return tuple(_frozen(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(tree.items()))
    return tree


def _own(leaf: object, known: dict[int, Tensor]) -> object:
    if not isinstance(leaf, Value):
        return leaf
    if leaf.id in known:
        return known[leaf.id]
    if leaf.tensor is None:
        raise NotKeptError("a constant of the region was not kept")
    # one number stands for a constant tensor: the region may run on another number of samples
    return leaf.tensor.flatten()[0].clone() if _uniform(leaf.tensor) and leaf.tensor.numel() else leaf.tensor.clone()


def _uniform(tensor: Tensor) -> bool:
    return tensor.numel() <= 1 or bool((tensor == tensor.flatten()[0]).all())


@dataclass(frozen=True)
class _Place:
    """Where a step finds an operand among the results so far."""

    index: int


def _step(call: Call, places: dict[int, int], skip: frozenset[str]) -> Callable[[list[Tensor]], Tensor]:
    """Return a call as a function of the results so far. It holds numbers alone: nothing of the run stays alive by it."""
    variables = [places[v.id] for v in call.inputs if v.id in places]
    if call.op in PASS or call.op in skip:
        return _passing(variables[0], to_bool=call.out.dtype == torch.bool)
    if call.op == "aten.copy":
        return lambda known: known[variables[-1]]
    if call.op == "aten.heaviside":  # has no derivative in torch; the comparison has, and it is zero
        return lambda known: (known[variables[0]] > 0).to(known[variables[0]].dtype)

    def stand_in(leaf: object) -> object:
        if not isinstance(leaf, Value):
            return leaf
        return _Place(places[leaf.id]) if leaf.id in places else _representative(leaf)

    func, in_place = call.func, call.in_place
    template = substitute(call.args, stand_in), substitute(call.kwargs, stand_in)

    def run(known: list[Tensor]) -> Tensor:
        args, kwargs = substitute(template, lambda leaf: known[leaf.index] if isinstance(leaf, _Place) else leaf)
        if in_place and isinstance(args[0], Tensor):
            args = (args[0].expand(known[variables[0]].shape).clone(), *args[1:])
        return func(*args, **kwargs)  # type: ignore[no-any-return]

    return run


def _passing(place: int, *, to_bool: bool) -> Callable[[list[Tensor]], Tensor]:
    def run(known: list[Tensor]) -> Tensor:
        first = known[place]
        if to_bool and first.dtype != torch.bool:
            return first != 0
        return first if first.is_floating_point() or to_bool else first.double()

    return run


def _representative(value: Value) -> Tensor:
    """Return one number for a constant: its median; the side of a mask that lets values through.

    A weight that has no numbers changes nothing, zero where it is added and one elsewhere, or is what it starts as: the
    slope of a PReLU.
    """
    if value.tensor is None or value.tensor.numel() == 0:
        users = {user.op for user in value.users}
        number = 0.0 if users and users <= {"aten.add", "aten.sub"} else 0.25 if "aten.prelu" in users else 1.0
        return torch.tensor(number, dtype=torch.float64)
    tensor = value.tensor.detach()
    if tensor.dtype == torch.bool:
        return tensor.flatten()[0].clone()
    return tensor.flatten().double().median()


def _many_variables(call: Call) -> bool:
    return sum(v.data and v.param for v in call.inputs) > 1


def is_variable(value: Value) -> bool:
    """Whether a value was computed from input and parameters, as numbers or as a comparison of numbers."""
    return value.data and value.param and (value.floating or value.dtype == torch.bool)


class Regions:
    """The base of every value of a trace, and the regions that leave a base."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.unread: set[Call] = set()  # calls of regions whose function could not be had
        # what a bias is added to is not yet the layer's output
        self._biases = {bias.id for call in trace.calls if (bias := bias_of(call)) is not None}
        self._base: dict[int, Value] = {value.id: value for value in trace.values}
        for call in trace.calls:
            base = self._common_base(call)
            if base is not None:
                self._base[call.out.id] = base

    def base(self, value: Value) -> Value:
        """Return the value that ``value`` is an entry-by-entry function of (itself at least)."""
        return self._base[value.id]

    def _common_base(self, call: Call) -> Value | None:
        if not call.outputs or not _entrywise(call) or call.id in self._biases:
            return None
        bases = {self._base[v.id] for v in call.inputs if is_variable(v)}
        if len(bases) == 1 and self._scales_units(call, next(iter(bases))):
            return None
        if len(bases) != 1 or not is_variable(call.out):
            return None
        base = bases.pop()
        if any(v.data and not v.param and v.floating for v in call.inputs):
            return None  # the raw input takes part, entry by entry: new energies
        others = (v for v in call.inputs if v.data and v.param and not is_variable(v))  # integers decide nothing here
        return (
            base
            if base.floating and not base.dtype.is_complex and call.out.shape == base.shape and not any(others)
            else None
        )

    def _scales_units(self, call: Call, base: Value) -> bool:
        """Whether a call shifts or scales, unit by unit, all that there is of a region so far: what follows is a
        function of the result, and the same one for every unit."""
        if call.op not in _UNIT_SCALES or len(call.inputs) != 2 or call.in_place:
            return False
        varied = [v for v in call.inputs if is_variable(v)]
        plain = [v for v in call.inputs if v.param and not v.data and math.prod(v.shape) > 1]
        if len(varied) != 1 or len(plain) != 1 or varied[0].users != [call]:
            return False
        if varied[0] is base:
            return True
        so_far = self.region(varied[0]).calls
        return all(user in so_far for made in (base, *(c.out for c in so_far[:-1])) for user in made.users)

    def inside(self, call: Call, base: Value) -> bool:
        """Whether ``call`` continues the region of ``base``."""
        return bool(call.outputs) and call.out is not base and self._base[call.out.id] is base

    def region(self, end: Value) -> Region:
        """Return the region that leads to ``end``."""
        base = self.base(end)
        seen: set[int] = set()
        needed: dict[int, Call] = {}
        stack = [end]
        while stack:
            value = stack.pop()
            if value is base or value.id in seen or self._base[value.id] is not base:
                continue
            seen.add(value.id)
            if value.call is not None:
                needed[value.call.id] = value.call
                stack.extend(value.call.inputs)
        return Region(base, end, [needed[place] for place in sorted(needed)])

    def ends(self) -> list[Value]:
        """Return the values where a region is left: used by a call outside it, or returned by the model."""
        returned = {value.id for value in self.trace.outputs}
        found = []
        for value in self.trace.values:
            base = self.base(value)
            if base is value or not is_variable(value):
                continue
            outside = [call for call in value.users if not self.inside(call, base)]
            if value.id in returned or outside:
                found.append(value)
        return found


def _entrywise(call: Call) -> bool:
    if call.op == "aten.index_put":
        indices = [index for index in call.args[1] if isinstance(index, Value)]
        return all(index.dtype == torch.bool and is_variable(index) for index in indices)
    return pointwise(call.op) or is_binary_extremum(call)
