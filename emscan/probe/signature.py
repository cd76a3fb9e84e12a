"""What forward takes, and which tensor of a probe goes where: by name, then by order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.probe.batch import Batch

_PLAIN = {name: name for name in ("int", "float", "bool", "str")}
TARGET_NAMES = ("targets", "target", "labels", "label", "y")


@dataclass(frozen=True)
class Parameter:
    """One parameter of forward. ``fillable``: a tensor may go there by order (its default, if any, is None).

    ``plain``: the type, where it is declared to take a number or a text, not a tensor.
    """

    name: str
    required: bool
    fillable: bool = True
    keyword_only: bool = False
    plain: str = ""


@dataclass(frozen=True)
class Signature:
    """The parameters of forward in order; ``rest`` and ``extra``: whether it takes *args and **kwargs."""

    parameters: tuple[Parameter, ...]
    rest: bool = False
    extra: bool = False

    @property
    def required(self) -> list[str]:
        """Names of the parameters without a default."""
        return [parameter.name for parameter in self.parameters if parameter.required]

    @property
    def plain(self) -> dict[str, str]:
        """The declared types of the parameters without a default that take no tensor, by name."""
        return {p.name: p.plain for p in self.parameters if p.required and p.plain}

    @property
    def most(self) -> float:
        """The largest number of tensors that fit by order."""
        return float("inf") if self.rest else sum(p.fillable and not p.keyword_only for p in self.parameters)

    def __str__(self) -> str:
        """Return the call as a reader writes it."""
        names = [p.name if p.required else f"{p.name}=..." for p in self.parameters]
        return f"forward({', '.join([*names, *['*args'] * self.rest, *['**kwargs'] * self.extra])})"


def forward_parameters(module: nn.Module) -> list[str]:
    """Return the names of forward's parameters in order, without ``self``, ``*args`` and ``**kwargs``."""
    return [parameter.name for parameter in signature(module).parameters]


def signature(module: nn.Module) -> Signature:
    """Return what ``module.forward`` takes, for modules, TorchScript and exported programs alike."""
    schema = getattr(getattr(module, "forward", None), "schema", None)
    if schema is not None:
        arguments = schema.arguments[1:]
        return Signature(tuple(_of_schema(argument) for argument in arguments))
    inner = getattr(module, "_orig_mod", None) or (module.module if isinstance(module, nn.DataParallel) else None)
    if isinstance(inner, nn.Module):  # a wrapper's forward takes anything
        return signature(inner)
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return Signature((), rest=True, extra=True)
    kinds = {parameter.kind for parameter in parameters}
    keywords = _exported_keywords(module)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Signature(
        tuple(
            Parameter(
                p.name,
                p.default is p.empty,
                p.default is p.empty or p.default is None,
                p.kind is p.KEYWORD_ONLY or p.name in keywords,
                _PLAIN.get(getattr(p.annotation, "__name__", str(p.annotation)), ""),
            )
            for p in named
        ),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


def _of_schema(argument: Any) -> Parameter:
    required = not argument.has_default_value()
    plain = _PLAIN.get(str(argument.type), "")
    return Parameter(argument.name, required, required or argument.default_value is None, plain=plain)


def _exported_keywords(module: nn.Module) -> list[str]:
    """Return the parameters that an exported program takes by keyword only, as it was exported with them."""
    spec = getattr(module, "_in_spec", None) if isinstance(module, torch.fx.GraphModule) else None
    if spec is None or spec.num_children != 2:
        return []
    return list(spec.child(1).context or [])


def match_named(tensors: Mapping[str, Any], forward: Signature, where: str) -> Batch:
    """Match values with names to forward's parameters, by name and then by order; targets go to the objective.

    A single tensor goes to the first parameter whatever its name, unless its name alone makes a complete call.
    ``where`` begins the message of a ProbeError. ``samples`` is 0: the caller sets it.
    """
    left = dict(tensors)
    names = {parameter.name for parameter in forward.parameters}
    if len(left) == 1 and (forward.parameters or forward.rest):
        name, value = next(iter(left.items()))
        if name not in names or not set(forward.required) <= {name}:
            return match_ordered([value], forward, where)
    targets = None
    wanted = next((name for name in TARGET_NAMES if name in left and name not in names), None)
    if wanted is not None:
        targets = left.pop(wanted)
        if len(left) == 1 and next(iter(left)) not in names:
            return _call(forward, {}, list(left.values()), {}, targets, where, list(left))
    if not left:
        raise ProbeError(f"{where} holds {'only ' + wanted if wanted else 'no tensors'}", f"add the input of {forward}")
    filled = {name: left.pop(name) for name in [*left] if name in names}
    if forward.extra and not forward.rest:
        return _call(forward, filled, [], left, targets, where, list(tensors))
    return _call(forward, filled, list(left.values()), {}, targets, where, list(tensors))


def match_ordered(values: Sequence[Any], forward: Signature, where: str) -> Batch:
    """Match values without names to forward's parameters in order."""
    return _call(forward, {}, list(values), {}, None, where, [f"{len(values)} tensors"])


def with_numbers(batch: Batch, forward: Signature) -> Batch:
    """Return the batch with tensors of one entry as Python numbers, where forward is declared to take numbers."""
    wanted = {p.name for p in forward.parameters if p.plain and p.plain != "str"}
    names = [p.name for p in forward.parameters if not p.keyword_only]

    def number(name: str, value: Any) -> Any:
        return value.item() if name in wanted and isinstance(value, Tensor) and value.numel() == 1 else value

    args = (number(names[i] if i < len(names) else "", value) for i, value in enumerate(batch.args))
    kwargs = {name: number(name, value) for name, value in batch.kwargs.items()}
    return Batch(tuple(args), kwargs, batch.targets, batch.samples)


def _call(
    forward: Signature,
    filled: dict[str, Any],
    by_order: list[Any],
    keywords: dict[str, Any],
    targets: Tensor | None,
    where: str,
    held: list[str],
) -> Batch:
    filled = dict(filled)
    open_names = [p.name for p in forward.parameters if p.fillable and p.name not in filled]
    placed = dict(zip(open_names, by_order, strict=False))
    rest = by_order[len(placed) :]
    filled |= placed
    missing = [name for name in forward.required if name not in filled]
    if forward.extra and keywords and missing:  # names that fit nothing stand for the parameters that are missing
        moved = dict(zip(missing, [*keywords], strict=False))
        filled |= {name: keywords.pop(key) for name, key in moved.items()}
        missing = missing[len(moved) :]
    holds = f"{where} holds {', '.join(held)}"
    if missing:
        raise ProbeError(f"{holds}, but {forward} also needs {', '.join(missing)}", "add it under that name")
    if rest and not forward.rest:
        raise ProbeError(
            f"{holds}, more than {forward} takes",
            f"leave the others out, or call what belongs to the objective {TARGET_NAMES[0]}",
        )
    args: list[Any] = []
    for parameter in forward.parameters:
        if parameter.keyword_only or parameter.name not in filled:
            break
        args.append(filled.pop(parameter.name))
    if rest and filled:
        raise ProbeError(f"{holds}, which {forward} cannot take in order", "name each tensor after its parameter")
    return Batch((*args, *rest), {**filled, **keywords}, targets, 0)
