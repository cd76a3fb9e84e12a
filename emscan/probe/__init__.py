"""A probe SPEC or Python objects -> batches of tensors matched to forward's parameters."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from emscan.errors import ProbeError, UsageError
from emscan.probe.batch import Batch, Placing, Probe, check_batch_size, check_samples
from emscan.probe.files import READERS, read
from emscan.probe.layout import parameter_dtype
from emscan.probe.mapped import Pages
from emscan.probe.python import Reopen, any_probe, from_python, whole_probe
from emscan.probe.signature import forward_parameters, match_named, match_ordered, signature
from emscan.probe.synthetic import DISTRIBUTIONS, synthesize
from emscan.probe.usercode import find
from emscan.report.document import ProbeInfo

__all__ = ["Batch", "Probe", "forward_parameters", "from_python", "open_probe"]

_FORMS = (
    f"give a file ({', '.join(READERS)}), package.module:callable, path/to/file.py:callable or random[:normal|uniform]"
)
_TARGET = re.compile(r"[^:]+(\.py)?:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def open_probe(
    spec: str | None,
    module: nn.Module,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> Probe:
    """Return the probe that ``spec`` names, on ``device``, floating inputs in the dtype of the model's parameters.

    ``spec``: a file of tensors, `package.module:callable` or `path/to/file.py:callable` giving batches,
    `random[:normal|uniform]`, or None for a synthetic probe whose shape is derived from the model. Without a batch
    size, at most 1,024 samples and about a million input elements run at once (an integer id counts as 256).
    ``trust``: a `.pt` file may hold more than tensors safely can. Raises ProbeError for a probe that is unreadable or
    does not fit, UsageError for a batch size that is not positive.
    """
    check_batch_size(batch_size)
    placing = Placing(torch.device(device), parameter_dtype(module))
    if spec is None or spec == "random" or spec.startswith("random:"):
        return _random(spec, module, placing, batch_size, seed)
    if Path(spec).suffix.lower() in READERS:
        return _from_file(spec, module, placing, batch_size, seed, trust)
    if not Path(spec).exists() and _TARGET.fullmatch(spec):
        return _from_code(spec, module, placing, batch_size, seed)
    what = "is a file of no known kind" if Path(spec).is_file() else "is no probe"
    raise ProbeError(f"--probe {spec} {what}", _FORMS)


def _random(spec: str | None, module: nn.Module, placing: Placing, size: int | None, seed: int) -> Probe:
    distribution = (spec or "random").partition(":")[2] or DISTRIBUTIONS[0]
    if distribution not in DISTRIBUTIONS:
        raise UsageError(
            f"--probe {spec}: there is no distribution {distribution}", f"use {' or '.join(DISTRIBUTIONS)}"
        )
    made = synthesize(module, distribution, seed)
    info = ProbeInfo(f"{spec or 'synthetic'}: {made.source}", synthetic=True, seed=seed)
    return whole_probe(info, made.batch, module, placing, size, made.axis)


def _from_file(path: str, module: nn.Module, placing: Placing, size: int | None, seed: int, trust: bool) -> Probe:
    contents = read(path, trust=trust)
    where = f"the probe {path}"
    forward = signature(module)
    named = contents.named or {f"tensor {index}": tensor for index, tensor in enumerate(contents.ordered or [])}
    if contents.named is not None:
        call = match_named(contents.named, forward, where)
    else:
        call = match_ordered(contents.ordered or [], forward, where)
    first = next(iter(named.values()))
    whole = Batch(call.args, call.kwargs, call.targets, first.shape[0] if first.ndim else 0)
    check_samples(whole, {id(tensor): name for name, tensor in named.items()}, where)
    info = ProbeInfo(path, seed=seed, sha256=contents.sha256)
    placing = replace(placing, release=Pages(path).release)
    return whole_probe(info, whole, module, placing, size)


def _from_code(spec: str, module: nn.Module, placing: Placing, size: int | None, seed: int) -> Probe:
    again = find(spec)
    return any_probe(ProbeInfo(spec, seed=seed), Reopen(again(), again), None, module, placing, size)
