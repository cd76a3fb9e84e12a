"""Why a probe does not fit a model: the operator that raised, its weight's shape, and what the probe gave it.

The model is run once more under a watch that knows which tensors are the probe's. What is said follows from operands:
a table's rows against ids, a weight's features and channels against shapes, dtypes against dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.probe.batch import Batch, map_tensors
from emscan.probe.watch import LOOKUPS, Failure, Watch, named_tensors, owners, raising_modules, run_watched
from emscan.state import undisturbed

Said = tuple[str, str]  # message and hint
_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution".split()
)
_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}
_PRODUCTS = {"linear": (0, 1, -1), "matmul": (0, 1, -2), "mm": (0, 1, -2), "addmm": (1, 2, -2)}
_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
_JOINS = frozenset({"add", "sub", "mul", "div", "cat", "add_", "mul_", "where", "masked_fill", "expand", "addcmul"})


def explain(module: nn.Module, batch: Batch, error: BaseException) -> Said | None:
    """Return (message, hint) where the shapes, dtypes or ids of a batch are why the model raised ``error``, else None.

    The model is run once more on the batch and given back as it was.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return None
    try:
        with undisturbed(module, 0):
            watch, again = run_watched(module, batch)
            if again is None or type(again) is not type(error):
                return None
            facts = _Facts(module, batch, owners(module), watch.name)
            failure = watch.reason(module, again)
            if failure is not None:
                return _of_operator(failure, facts)
            return _of_module(again, facts)
    except Exception:  # an explanation is a help; the error itself is reported in any case
        return None


@dataclass(frozen=True)
class _Facts:
    module: nn.Module
    batch: Batch
    owner: Callable[[Tensor], str | None]  # the name of a parameter or buffer
    name: Callable[[Tensor], str | None]  # the name of what is the probe's

    def layer(self, kind: str, weight: Tensor) -> str:
        """Return a layer in words, by the name of its weight."""
        name = self.owner(weight)
        place = name.rpartition(".")[0] or name if name is not None else None
        return f"the model's {kind}" + (f" ({place})" if place is not None else "")

    def inputs(self) -> str:
        """Return the probe's tensors with their shapes."""
        found = named_tensors(self.module, self.batch)
        return ", ".join(f"{name} {_shape(tensor)}" for name, tensor in [*found.items()][:3])


def _of_operator(failure: Failure, facts: _Facts) -> Said | None:
    if failure.op in LOOKUPS:
        return _lookup(failure, facts)
    if failure.op in _CONVOLUTIONS:
        return _convolution(failure, facts)
    if failure.op in _PRODUCTS:
        return _product(failure, facts)
    if failure.op in _NORMS:
        return _normalization(failure, facts)
    return _join(failure, facts) if failure.op in _JOINS else None


# -- ids ----------------------------------------------------------------------------------------------------------------


def _lookup(failure: Failure, facts: _Facts) -> Said | None:
    table, ids = failure.tensor(0), failure.tensor(1)
    if table is None or ids is None or table.ndim != 2:
        return None
    where, name = facts.layer("embedding", table), failure.names.get(1)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if name is None:
            return None
        return (
            f"{where} takes integer ids (0 to {table.shape[0] - 1:,}), the probe's {name} holds {_dtype(ids)}",
            "give token ids as integers",
        )
    if not ids.numel() or ids.is_meta:
        return None
    return outside(name, where, table.shape[0], int(ids.min()), int(ids.max()), _lengths(facts, table.shape[0]))


def outside(name: str | None, where: str, rows: int, low: int, high: int, longer: str = "") -> Said | None:
    """Return what is wrong with ids from ``low`` to ``high`` for a table of ``rows`` rows, None where they fit."""
    if low >= 0 and high < rows:
        return None
    has = f"{where} has {rows:,} rows (0 to {rows - 1:,})"
    if name is None:
        hint = f"shorten the samples: the probe's {longer}" if longer else "check that --probe fits the model"
        return f"{has}, row {low if low < 0 else high:,} is looked up", hint
    if low < 0:
        return (
            f"the ids in the probe's {name} go down to {low:,}, {has}",
            "fill up with the model's pad id; what the loss ignores belongs to the targets",
        )
    return f"the ids in the probe's {name} go up to {high:,}, {has}", "tokenize with the model's own tokenizer"


def _lengths(facts: _Facts, rows: int) -> str:
    """Return the first of the probe's tensors that has more positions than ``rows``, in words."""
    for name, tensor in named_tensors(facts.module, facts.batch).items():
        if tensor.ndim >= 2 and tensor.shape[1] > rows:
            return f"{name} has {tensor.shape[1]:,} positions"
    return ""


# -- layers -------------------------------------------------------------------------------------------------------------


def _product(failure: Failure, facts: _Facts) -> Said | None:
    at, weight_at, axis = _PRODUCTS[failure.op]
    x, weight = failure.tensor(at), failure.tensor(weight_at)
    if x is None or weight is None or weight.ndim != 2 or facts.owner(weight) is None or not x.ndim:
        return None
    features, where, name = weight.shape[axis], facts.layer("linear layer", weight), failure.names.get(at)
    if x.dtype != weight.dtype:
        return _other_dtype(x, weight, where, name)
    if x.shape[-1] == features:
        return None
    return _features(where, features, x, name, facts)


def _features(where: str, features: int, x: Tensor, name: str | None, facts: _Facts) -> Said:
    if name is None:
        return (
            f"{where} takes {features:,} features and gets {x.shape[-1]:,} from the layers before it",
            f"the probe ({facts.inputs()}) is of another size than the model was made for",
        )
    sample = list(x.shape[1:])
    held = " x ".join(map(str, sample)) if len(sample) > 1 else f"{x.shape[-1]:,}"
    if len(sample) > 1 and math.prod(sample) == features:
        return (
            f"{where} takes {features:,} features, the probe's {name} has {held}",
            "flatten each sample: x.reshape(N, -1)",
        )
    hint = f"put {features:,} features on the last axis"
    if len(sample) >= 2 and sample[0] == features:
        hint += ", where axis 1 has them now: x.swapaxes(1, -1)"
    return f"{where} takes {features:,} features, the probe's {name} has {held}", hint


def _convolution(failure: Failure, facts: _Facts) -> Said | None:
    x, weight = failure.tensor(0), failure.tensor(1)
    if x is None or weight is None:
        return None
    axes, transposed, groups = weight.ndim - 2, *_kind(failure)
    if axes not in _AXES:
        return None
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    where, name = facts.layer("convolution", weight), failure.names.get(0)
    if x.dtype != weight.dtype:
        return _other_dtype(x, weight, where, name)
    wants = f"{where} takes (N, {channels}, {_AXES[axes]})"
    if name is None:
        return _inner_convolution(x, weight, channels, axes, where, facts)
    gets = f"the probe's {name} is {_shape(x)}"
    if x.ndim != axes + 2:
        hint = f"give {axes + 2} axes, samples on axis 0"
        if x.ndim == axes + 1 and channels == 1:
            hint = f"add an axis for the channel: {name}[:, None]"
        return f"{wants}, {gets}", hint
    if x.shape[1] != channels:
        if x.shape[-1] == channels:
            order = ", ".join(map(str, (0, axes + 1, *range(1, axes + 1))))
            return f"{wants}, {gets}: channels last", f"move the channels to axis 1: {name}.permute({order})"
        return (
            f"{wants}, {gets}: {x.shape[1]} channel{'s' * (x.shape[1] != 1)}",
            f"give {channels} channel{'s' * (channels != 1)}",
        )
    return _too_small(x, weight, axes, where, f"the probe's {name} is")


def _inner_convolution(x: Tensor, weight: Tensor, channels: int, axes: int, where: str, facts: _Facts) -> Said | None:
    if x.ndim == axes + 2 and x.shape[1] != channels:
        return (
            f"{where} takes {channels:,} channels and gets {x.shape[1]:,} from the layers before it",
            f"the probe ({facts.inputs()}) is of another size than the model was made for",
        )
    return _too_small(x, weight, axes, where, "it gets")


def _too_small(x: Tensor, weight: Tensor, axes: int, where: str, gets: str) -> Said | None:
    kernel, size = tuple(weight.shape[2:]), tuple(x.shape[-axes:])
    if x.ndim != axes + 2 or all(k <= s for k, s in zip(kernel, size, strict=True)):
        return None
    return f"{where} has a kernel of {_by(kernel)}, {gets} {_by(size)}", "give larger samples"


def _kind(failure: Failure) -> tuple[bool, int]:
    """Return whether a convolution is transposed, and its groups."""
    if failure.op in ("convolution", "_convolution"):  # what graphs call
        return bool(failure.args[6]), int(failure.args[8])
    groups = failure.args[6] if len(failure.args) > 6 else failure.kwargs.get("groups", 1)
    return failure.op.startswith("conv_transpose"), int(groups)


def _normalization(failure: Failure, facts: _Facts) -> Said | None:
    x = failure.tensor(0)
    if x is None:
        return None
    known = [t for t in failure.args[1:] if isinstance(t, Tensor) and facts.owner(t) is not None]
    if not known:
        return None
    wanted, where = tuple(known[0].shape), facts.layer("normalization", known[0])
    last = failure.op in ("layer_norm", "rms_norm")
    if last:
        held = tuple(x.shape[-len(wanted) :])
    else:
        held = tuple(x.shape[1:2])
    if held == wanted:
        return _other_dtype(x, known[0], where, failure.names.get(0)) if x.dtype != known[0].dtype else None
    place = "on the last axis" if last else "on axis 1"
    return _mismatch(f"{where} takes {_by(wanted)} features {place}", x, failure.names.get(0), facts)


def _mismatch(wants: str, x: Tensor, name: str | None, facts: _Facts) -> Said:
    if name is not None:
        return f"{wants}, the probe's {name} is {_shape(x)}", "check the order and the sizes of its axes"
    return (
        f"{wants} and gets {_shape(x)} from the layers before it",
        f"the probe ({facts.inputs()}) is of another size than the model was made for",
    )


def _join(failure: Failure, facts: _Facts) -> Said | None:
    """Say which parameter does not go together with what was computed: a position table, most often."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, list(failure.args))
    if failure.op == "expand" and tensors:
        return _expansion(tensors[0], failure.args[1], facts)
    held = [(tensor, facts.owner(tensor)) for tensor in tensors]
    table = next(((tensor, name) for tensor, name in held if name is not None), None)
    other = next((tensor for tensor, name in held if name is None), None)
    if table is None or other is None or _broadcast(table[0].shape, other.shape):
        return None
    return (
        f"the model's {table[1]} of shape {_shape(table[0])} meets values of shape {_shape(other)}",
        f"the probe ({facts.inputs()}) is of another size or length than the model was made for",
    )


def _expansion(table: Tensor, sizes: Any, facts: _Facts) -> Said | None:
    name, longer = facts.owner(table), _lengths(facts, table.shape[-1]) if table.ndim else ""
    if name is None and not longer:
        return None
    what = f"the model's {name}" if name is not None else "a table of the model's"
    hint = f"shorten the samples: the probe's {longer}" if longer else "check that --probe fits the model"
    return f"{what} has shape {_shape(table)}, {tuple(sizes)} is asked for", hint


def _broadcast(a: torch.Size, b: torch.Size) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def _other_dtype(x: Tensor, weight: Tensor, where: str, name: str | None) -> Said | None:
    if name is None:
        return None
    hint = f"convert it: {name}.to({weight.dtype})"
    if x.dtype == torch.uint8:
        hint = "convert it to floating point, scaled as in training (0 to 1, normalized)"
    elif not x.is_floating_point():
        hint = "give floating-point features, not ids or labels"
    return f"{where} computes in {_dtype(weight)}, the probe's {name} holds {_dtype(x)}", hint


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in sizes)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# -- modules that check their input in Python ----------------------------------------------------------------------------


def _of_module(error: BaseException, facts: _Facts) -> Said | None:
    """Explain what recurrent layers, attention and normalization refuse before any operator runs."""
    for module, variables in raising_modules(error):
        found = next(_refused(module, variables, facts), None)
        if found is not None:
            return found
    return None


def _refused(module: nn.Module, variables: dict[str, Tensor], facts: _Facts) -> Iterator[Said]:
    own = dict(module.named_parameters(recurse=False))
    for kind, parameter, variable in (
        ("recurrent layer", "weight_ih_l0", "input"),
        ("recurrent cell", "weight_ih", "input"),
        ("attention", "in_proj_weight", "query"),
    ):
        weight, x = own.get(parameter), variables.get(variable)
        if weight is not None and x is not None and x.ndim and weight.shape[1] != x.shape[-1]:
            yield _features(facts.layer(kind, weight), weight.shape[1], x, facts.name(x), facts)
    weight, x = own.get("weight"), variables.get("input")
    if weight is not None and weight.ndim == 1 and x is not None and tuple(x.shape[1:2]) != tuple(weight.shape):
        wants = f"{facts.layer('normalization', weight)} takes {_by(tuple(weight.shape))} features on axis 1"
        yield _mismatch(wants, x, facts.name(x), facts)


# -- ids on an accelerator -----------------------------------------------------------------------------------------------


class IdRanges:
    """The rows that integer inputs index, learned once from shapes alone, against the ids of every batch.

    On an accelerator an id out of range is an assertion that ends the process's use of the device: it has to be found
    before the run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._rows: dict[str, tuple[int, str]] | None = None

    def check(self, batch: Batch) -> None:
        """Raise ProbeError for an id out of range; does nothing on the processor, which raises by itself."""
        integers = {n: t for n, t in named_tensors(self.module, batch).items() if _is_integer(t) and t.numel()}
        if not any(tensor.device.type not in ("cpu", "meta") for tensor in integers.values()):
            return
        self.compare(batch, integers)

    def compare(self, batch: Batch, integers: dict[str, Tensor]) -> None:
        """Raise ProbeError for an id among ``integers`` that is out of range."""
        if self._rows is None:
            self._rows = self._learn(batch)
        for name, tensor in integers.items():
            if name in self._rows:
                rows, where = self._rows[name]
                said = outside(name, where, rows, int(tensor.min()), int(tensor.max()))
                if said is not None:
                    raise ProbeError(*said)

    def _learn(self, batch: Batch) -> dict[str, tuple[int, str]]:
        """Run the model on shapes; a run that stops half-way has shown what came before."""
        if isinstance(self.module, torch.jit.ScriptModule):
            return {}

        def shapes(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="meta")

        state = {n: shapes(t) for n, t in (*self.module.named_parameters(), *self.module.named_buffers())}
        names = {id(tensor): name for name, tensor in state.items()}
        call = Batch(map_tensors(shapes, batch.args), map_tensors(shapes, batch.kwargs), None, batch.samples)
        watch = Watch(named_tensors(self.module, call))
        try:
            with undisturbed(self.module, 0), torch.inference_mode(), torch.device("meta"), watch:
                torch.func.functional_call(self.module, state, call.args, call.kwargs)
        except Exception:  # control flow that depends on numbers, for one
            pass
        learned = {}
        for name, (rows, table) in watch.looked_up.items():
            place = names.get(id(table), "").rpartition(".")[0]
            learned[name] = (rows, "the model's embedding" + (f" ({place})" if place else ""))
        return learned


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
