"""A probe SPEC or Python objects -> batches of tensors matched to forward's parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from emscan.errors import ProbeError, UsageError
from emscan.probe import pictures, text
from emscan.probe.arguments import Arguments
from emscan.probe.batch import Batch, Placing, Probe, check_batch_size, check_samples
from emscan.probe.files import READERS, read
from emscan.probe.images import open_images
from emscan.probe.layout import parameter_dtype
from emscan.probe.mapped import Pages
from emscan.probe.odd import Odd
from emscan.probe.python import Reopen, any_probe, from_python, whole_probe
from emscan.probe.signature import forward_parameters, match_named, match_ordered, signature, with_numbers
from emscan.probe.synthetic import DISTRIBUTIONS, synthesize
from emscan.probe.usercode import find
from emscan.report.document import ProbeInfo

__all__ = ["Batch", "Probe", "forward_parameters", "from_python", "open_probe"]

_FORMS = (
    f"give a file of tensors ({', '.join(READERS)}) or text ({', '.join(sorted(text.ENDINGS))}), a folder of images, "
    "package.module:callable, path/to/file.py:callable or random[:normal|uniform]"
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
    arguments: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Probe:
    """Return the probe that ``spec`` names, on ``device``, floating inputs in the dtype of the model's parameters.

    ``spec``: a file of tensors, a file of text (one sample per line), a folder of images, `package.module:callable` or
    `path/to/file.py:callable` giving batches, `random[:normal|uniform]`, or None for a synthetic probe whose shape is
    derived from the model. Without a batch size, at most 1,024 samples and about a million input elements run at once
    (an integer id counts as 256). ``trust``: a `.pt` file may hold more than tensors safely can, and a tokenizer may be
    code. ``arguments``: options of images (`recipe.KNOWN`) and text. ``folder``: where the model lies, whose image
    processor and tokenizer are used. Raises ProbeError for a probe that is unreadable or does not fit, UsageError for
    a batch size that is not positive and for options.
    """
    check_batch_size(batch_size)
    placing = Placing(torch.device(device), parameter_dtype(module))
    place = Path(spec or "")
    if spec is not None and place.suffix.lower() not in READERS:
        if place.is_dir() or (place.suffix.lower() in pictures.ENDINGS and place.is_file()):
            return open_images(spec, module, placing, batch_size, seed, arguments, folder)
        if place.suffix.lower() in text.ENDINGS:
            return text.open_text(spec, module, placing, batch_size, seed, arguments, folder, trust)
    Arguments(arguments, (), f"--probe {spec}" if spec is not None else "a synthetic probe")
    if spec is None or spec == "random" or spec.startswith("random:"):
        return _random(spec, module, placing, batch_size, seed)
    if Path(spec).suffix.lower() in READERS:
        return _watched(_from_file(spec, module, placing, batch_size, seed, trust), module, folder)
    if not Path(spec).exists() and _TARGET.fullmatch(spec):
        return _watched(_from_code(spec, module, placing, batch_size, seed), module, folder)
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


def _watched(probe: Probe, module: nn.Module, folder: Path | None) -> Probe:
    probe.look = Odd(module, folder).look
    return probe


def _from_file(path: str, module: nn.Module, placing: Placing, size: int | None, seed: int, trust: bool) -> Probe:
    contents = read(path, trust=trust)
    where = f"the probe {path}"
    forward = signature(module)
    named = contents.named or {f"tensor {index}": tensor for index, tensor in enumerate(contents.ordered or [])}
    if contents.named is not None:
        call = match_named(contents.named, forward, where)
    else:
        call = match_ordered(contents.ordered or [], forward, where)
    first = next((tensor for tensor in named.values() if tensor.ndim), None)
    whole = Batch(call.args, call.kwargs, call.targets, first.shape[0] if first is not None else 0)
    check_samples(whole, {id(tensor): name for name, tensor in named.items()}, where)
    info = ProbeInfo(path, seed=seed, sha256=contents.sha256)
    placing = replace(placing, release=Pages(path).release)
    return whole_probe(info, with_numbers(whole, forward), module, placing, size)


def _from_code(spec: str, module: nn.Module, placing: Placing, size: int | None, seed: int) -> Probe:
    again = find(spec)
    return any_probe(ProbeInfo(spec, seed=seed), Reopen(again(), again), None, module, placing, size)
