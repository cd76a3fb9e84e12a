"""The audit from end to end: probe, trace, classify, measure, rules."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from emscan import rules
from emscan._version import __version__
from emscan.classify.objective import OBJECTIVES
from emscan.discovery import Audit
from emscan.errors import EmscanError, ModelError, ProbeError, UsageError
from emscan.limits import ceiling
from emscan.load import LoadedModel
from emscan.load.suggest import command
from emscan.load.target import MODEL
from emscan.load.unsafe import foreign_code
from emscan.probe import Batch, Probe, from_python, open_probe
from emscan.probe.configured import configured, has_configuration
from emscan.probe.misfit import IdRanges, explain
from emscan.report.document import (
    ModelInfo,
    ProbeInfo,
    Report,
    Thresholds,
)
from emscan.shapeless import lacks_weights, shapeless
from emscan.state import undisturbed, unwrapped
from emscan.trace.footprint import activation_bytes
from emscan.trace.leaves import named_state
from emscan.trace.record import named_inputs
from emscan.weights_only import examine

Progress = Callable[[int, int | None, int], None]
Hold = Callable[[], contextlib.AbstractContextManager[Any]]
_STRUCTURE = 2  # samples that show the structure of a model without weights


def run(
    loaded: LoadedModel,
    probe: Probe | None,
    *,
    objective: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    thresholds: Thresholds | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    hold: Hold = contextlib.nullcontext,
) -> Report:
    """Audit a loaded model on a probe and return the report, findings and summary filled.

    ``device`` is what the report names: model and probe are there already. ``max_memory``: bytes that the activations
    of one batch may take (default, for files: half of what is free). ``progress`` is called with (batches done, batches
    in all or None, samples done), first with zeros. ``hold()`` is entered for every batch after the first, so that a
    caller can keep interrupts out of its middle. Raises EmscanError where the model cannot be audited; a
    KeyboardInterrupt after the first batch carries the report of what was done, marked partial, as ``report``.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}", f"use one of {', '.join(OBJECTIVES)}")
    limits = thresholds or Thresholds()
    if loaded.module is None:
        report = _blank(loaded, probe, device, limits)
        report.weights = examine(loaded.weights or {}, command(loaded.info.path or "", loaded.weights or ()))
        return _finished(report)
    model = _unwrapped(loaded.module)
    audit = Audit(model, limits, objective, loaded.info.weights)
    quiet = foreign_code() if loaded.info.path is not None else contextlib.nullcontext()
    if probe is None:
        raise UsageError("no probe", "give inputs")
    report = _blank(loaded, probe, device, limits)
    done, stopped = _Done(), None
    try:
        with undisturbed(model, seed), quiet, running(model), _ceiling(loaded, max_memory, device):
            _through(probe, audit, done, max_memory, loaded.info.path is not None, progress, hold)
    except KeyboardInterrupt as stop:
        if not done.batches or type(stop) is not KeyboardInterrupt:  # a subclass: whoever raised it waits for nothing
            raise
        stopped = stop
    report.probe = dataclasses.replace(
        probe.info, samples=done.samples, batches=done.batches, partial=stopped is not None, objective=audit.goal
    )
    report.coverage = audit.coverage
    report.layers = audit.layers(done.samples)
    report = _finished(report)
    if stopped is not None:
        stopped.report = report  # type: ignore[attr-defined]
        raise stopped
    return report


@dataclass
class _Done:
    """How far the probe has come."""

    batches: int = 0
    samples: int = 0


def _through(
    probe: Probe, audit: Audit, done: _Done, max_memory: int | None, from_file: bool, progress: Progress | None,
    hold: Hold,
) -> None:  # fmt: skip
    """Run the whole probe: look at the structure of the first batch, measure all of them."""
    if progress is not None:
        progress(0, probe.total_batches, 0)
    ids = IdRanges(audit.model)
    for batch in probe:
        ids.check(batch)
        with hold() if done.batches else contextlib.nullcontext():
            try:
                measured = False
                if not done.batches:
                    if audit.weights:
                        _check_memory(audit.model, batch, max_memory, from_file=from_file)
                    measured = audit.discover(batch, few=True)
                if audit.weights and not measured:
                    audit.measure(batch)
            except EmscanError:
                raise
            except Exception as error:
                if _own(error):
                    raise
                raise _model_error(error, audit.model, batch) from error
            done.batches, done.samples = done.batches + 1, done.samples + batch.samples
        if not audit.weights:
            return  # what further batches would bring is numbers
        if progress is not None:
            progress(done.batches, probe.total_batches, done.samples)


def probe_for(
    module: nn.Module,
    spec: str | None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
    arguments: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Probe:
    """Return the probe that ``spec`` names, as `open_probe`; for structure alone a few samples are enough."""
    with running(module):
        if spec is None and lacks_weights(module) and has_configuration(module):
            made = configured(module, _STRUCTURE, seed)
            info = ProbeInfo(f"synthetic: {made.describe()}", synthetic=True, seed=seed)
            return Probe(info, lambda: iter([Batch((), made.values, None, made.samples)]), 1)
        return open_probe(
            spec, module, batch_size=batch_size, seed=seed, device=device, trust=trust, arguments=arguments,
            folder=folder,
        )  # fmt: skip


def running(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let a model whose weights are on the meta device be run in the body, by its structure alone."""
    return shapeless(model) if lacks_weights(model) else contextlib.nullcontext()


def _own(error: Exception) -> bool:
    """Whether an exception was raised by emscan's own code rather than by the model or an operator that it called."""
    trace = error.__traceback__
    raised = ""
    while trace is not None:
        raised = trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
    return raised.startswith(str(Path(__file__).parent))


def _model_error(error: Exception, model: nn.Module, batch: Batch) -> EmscanError:
    """Return what a raise in the model comes to: a probe that does not fit, where operands show it, or the raise."""
    said = explain(model, batch, error)
    if said is not None:
        return ProbeError(*said)
    inputs = named_inputs(batch.args, batch.kwargs).values()
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in list(inputs)[:4])
    found = MODEL.error(error, "running the model", named=False)
    found.hint = f"the probe gave tensors of shape {shapes}; check that --probe fits the model"
    return found


def _blank(loaded: LoadedModel, probe: Probe | None, device: str, thresholds: Thresholds) -> Report:
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    return Report(
        {"name": "emscan", "version": __version__},
        environment,
        thresholds,
        loaded.info,
        copy.copy(probe.info) if probe is not None else ProbeInfo("none"),
    )


def _finished(report: Report) -> Report:
    rules.apply(report)
    return report


def _check_memory(model: nn.Module, batch: Batch, limit: int | None, *, from_file: bool) -> None:
    """Refuse a batch whose activations would not fit, before anything is allocated for it.

    A live module without a limit is not looked at: its owner runs it anyway.
    """
    if limit is None and not from_file:
        return
    needed = activation_bytes(model, batch.args, batch.kwargs)
    allowed = allowed_memory(limit)
    if needed is not None and needed > allowed:
        raise ModelError(
            f"one batch of {batch.samples} samples needs about {needed / 2**20:,.0f} MiB of activations, "
            f"{allowed / 2**20:,.0f} MiB are allowed",
            "use a smaller --batch-size or a larger --max-memory",
        )


def allowed_memory(limit: int | None) -> int:
    """Return the bytes that activations may take: what the user says, or half of what is free."""
    return limit if limit is not None else _free_memory() // 2


def _ceiling(loaded: LoadedModel, limit: int | None, device: str) -> contextlib.AbstractContextManager[None]:
    """Let no run of a file's model take much more than that from the system, where shapes alone could not tell."""
    if loaded.info.path is None or torch.device(device).type != "cpu":
        return contextlib.nullcontext()
    return ceiling(allowed_memory(limit))


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def audit(
    model: Any,
    inputs: Any = None,
    *,
    objective: str | None = None,
    targets: Any = None,
    batch_size: int | None = None,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Audit a live model, where it is: a module, a ScriptModule or an ExportedProgram.

    ``inputs``: a tensor, a tuple of arguments, a dict of keyword arguments, or an iterable of batches of these; without
    it, a synthetic probe. ``targets``: for the objective. The model is returned to the state it was in.
    ``progress``: called with (batches done, batches in all or None, samples done).
    Raises EmscanError (UsageError, ProbeError, ModelError) with a message and a hint. A KeyboardInterrupt goes through;
    after the first batch it has the report so far, marked partial, as its attribute ``report`` (the batch that was
    running may be in some of its numbers).
    """
    module = _as_module(model)
    size = sum(tensor.numel() for kind, _, tensor in named_state(module) if kind == "param")
    info = ModelInfo(None, _format_of(model), None, size, False, weights=not lacks_weights(module))
    with running(module):
        where = str(next((p.device for p in module.parameters()), "cpu"))
        if inputs is None:
            probe = probe_for(module, None, batch_size=batch_size, seed=seed, device=where)
        else:
            probe = from_python(inputs, targets, module, batch_size=batch_size, seed=seed)
    return run(
        LoadedModel(module, None, info, []), probe, objective=objective or "auto", device=where, seed=seed,
        thresholds=thresholds, max_memory=max_memory, progress=progress,
    )  # fmt: skip


def _as_module(model: Any) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        try:
            return model.module()
        except Exception as error:  # a part called "code", for one, which torch's graphs use for themselves
            found = MODEL.error(error, "unpacking the exported program", named=False)
            found.hint = "audit the module that it was exported from"
            raise found from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"cannot audit a {type(model).__name__}", "give an nn.Module, a ScriptModule or an ExportedProgram"
        )
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ModelError("the model has lazy layers, whose weights do not exist yet", "run it once on an input first")
    return _unwrapped(model)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside wrappers that compile it or spread it over devices: its parameters have their names."""
    inner = unwrapped(module)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(cast(nn.Module, inner.module))
    return inner


def _format_of(model: Any) -> str:
    if isinstance(model, torch.export.ExportedProgram):
        return "torch-export"
    return "torchscript" if isinstance(model, torch.jit.ScriptModule) else "module"
