"""The audit from end to end: probe, trace, classify, measure, rules."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from emscan import rules
from emscan._version import __version__
from emscan.classify import Classification, Row, classify
from emscan.classify.coverage import COMPETITIVE
from emscan.classify.evidence import gather
from emscan.classify.objective import OBJECTIVES
from emscan.errors import EmscanError, ModelError, UsageError
from emscan.load import LoadedModel
from emscan.load.target import user_error
from emscan.load.unsafe import foreign_code
from emscan.measure import Meter, meter_for
from emscan.probe import Batch, Probe, from_python, open_probe
from emscan.probe.batch import part
from emscan.probe.configured import configured, has_configuration
from emscan.probe.layout import sequence_first
from emscan.report.document import (
    Alternatives,
    Conditions,
    Coverage,
    Evidence,
    Layer,
    ModelInfo,
    ProbeInfo,
    Report,
    Thresholds,
    Unclassified,
)
from emscan.shapeless import lacks_weights, shapeless
from emscan.state import afresh, undisturbed, unwrapped
from emscan.trace.follow import Taps, follow
from emscan.trace.footprint import activation_bytes
from emscan.trace.graph import Trace
from emscan.trace.leaves import named_state, parameter_names
from emscan.trace.record import named_inputs, record

Progress = Callable[[int, int | None], None]
_KEPT = 1 << 29  # bytes of values that discovery keeps at most
_FEW = 8  # samples that discovery looks at, at most
_STRUCTURE = 2  # samples that show the structure of a model without weights
_DISCOVERIES = 16  # batches that may bring new branches before the rest is left unclassified


@dataclass
class _Measured:
    """A row, its accumulator and its evidence."""

    row: Row
    meter: Meter | None
    evidence: Evidence | None = None


@dataclass
class _Audit:
    """State of one audit in progress."""

    model: nn.Module
    thresholds: Thresholds
    objective: str
    weights: bool = True  # without them there is nothing to measure
    rows: dict[object, _Measured] = field(default_factory=dict)
    order: list[object] = field(default_factory=list)
    taps: Taps = field(default_factory=Taps)
    coverage: Coverage = field(default_factory=Coverage)
    goal: str = "none"
    discoveries: int = 0

    def discover(self, batch: Batch, few: bool) -> None:
        """Trace part of a batch, classify it and start to watch what is new."""
        self.discoveries += 1
        trace, targets = self._record(batch, few)
        names = parameter_names(self.model)
        found = classify(trace, names, objective_name=self.objective, targets=targets, all_targets=batch.targets)
        if few and trace.inputs and _over_samples(found, self._sample_axis(batch)):
            del trace, found  # the samples themselves compete: K is the length of the batch, not of a part of it
            self.discoveries -= 1
            self.discover(batch, few=False)
            return
        first = not self.rows
        if first:
            self.goal = f"{found.objective.name} ({found.objective.reason})"
        place = 0
        for row in found.rows:
            place = self._adopt(row, found, place, first)
        self.coverage = found.coverage if first else _joined(self.coverage, found.coverage)
        self.taps.known |= {call.key for call in trace.calls}
        self.taps.settle(trace)
        _forget(trace)
        del trace, found
        _return_memory()

    def _sample_axis(self, batch: Batch) -> int:
        return 1 if sequence_first(self.model, list(named_inputs(batch.args, batch.kwargs).values())) else 0

    def _record(self, batch: Batch, few: bool) -> tuple[Trace, Tensor | None]:
        """Trace a few samples, or the whole batch where a model insists on its size."""
        count = min(batch.samples, max(2, min(_FEW, batch.samples // 16)))
        inputs = list(named_inputs(batch.args, batch.kwargs).values())
        axis = self._sample_axis(batch)
        if few and count < batch.samples and all(t.dim() > axis and t.shape[axis] == batch.samples for t in inputs):
            with contextlib.suppress(Exception):  # a model may insist on the batch size it was exported with
                cut = part(batch, 0, count, axis)
                with afresh(self.model, rehearsal=True):
                    return record(self.model, cut.args, cut.kwargs, budget=_KEPT), cut.targets
        with afresh(self.model, rehearsal=True):
            return record(self.model, batch.args, batch.kwargs, budget=_KEPT), batch.targets

    def _adopt(self, row: Row, found: Classification, place: int, first: bool) -> int:
        """Add a row, or further calls of one that is known; return where the next one belongs."""
        known = self.rows.get(row.key)
        if known is None:
            meter = meter_for(row.site, self.thresholds) if row.site is not None and self.weights else None
            known = self.rows[row.key] = _Measured(row, meter)
            self.order.insert(place if not first else len(self.order), row.key)
            if row.site is not None and row.site.verdict == "em" and self.weights:
                known.evidence = gather(row.site, found.trace, self.thresholds.evidence)
            new = row.sites
        else:
            seen = {site.emitted.key for site in known.row.sites}  # the same name is measured already
            new = [site for site in row.sites if site.emitted.key not in seen]
            known.row.sites.extend(new)
            known.row.calls = max(known.row.calls, row.calls)
        if known.meter is not None:
            for site in new:
                known.meter.attach(site, found.axes, self.taps)
        return self.order.index(row.key) + 1

    def measure(self, batch: Batch) -> None:
        """Run one batch under the taps; look again at a batch that takes branches not seen before."""
        unseen = self._follow(batch)
        if not unseen:
            return
        if self.discoveries >= _DISCOVERIES:
            self._leave(unseen)
            return
        before = self.taps
        self.taps = Taps(known=before.known)
        self.discover(batch, few=False)
        self._follow(batch)
        _add(before, self.taps)
        self.taps = before

    def _follow(self, batch: Batch) -> set[str]:
        """Run one batch under the taps; return the operators in computations not seen before."""
        with afresh(self.model):
            return follow(self.model, batch.args, batch.kwargs, self.taps, COMPETITIVE)[1]

    def _leave(self, unseen: set[str]) -> None:
        """Count operators in branches that came too late to be looked at: the audit is inconclusive about them."""
        where = "a branch of a later batch"
        left = {u.op: u for u in self.coverage.unclassified if u.where == where}
        for op in sorted(unseen):
            if op in left:
                left[op].calls += 1
            else:
                self.coverage.unclassified.append(Unclassified(op, where, 1))


def _over_samples(found: Classification, axis: int) -> bool:
    """Whether alternatives of some row run along the sample axis of an input."""
    for site in (row.site for row in found.rows if row.site is not None):
        dims = found.axes.of(site.energies)
        along = [dims[a] for a in site.axes if site.form is None and -a <= len(dims)]
        if any(factor.origin.kind == "input" and factor.origin.dim == axis for dim in along for factor in dim):
            return True
    return False


def _add(taps: Taps, new: Taps) -> None:
    for mine, theirs in ((taps.values, new.values), (taps.calls, new.calls)):
        for key, roles in theirs.items():
            mine.setdefault(key, {}).update(roles)
    taps.known |= new.known


def _joined(a: Coverage, b: Coverage) -> Coverage:
    """Coverage of two traces of one model: per operator, the trace that called it more often."""
    counts = {count.op: count for count in a.calls}
    for count in b.calls:
        if count.op not in counts or count.calls > counts[count.op].calls:
            counts[count.op] = count
    unknown = {(u.op, u.where): u for u in (*a.unclassified, *b.unclassified)}
    return Coverage([counts[op] for op in sorted(counts)], list(unknown.values()))


def _forget(trace: Trace) -> None:
    """Let go of the numbers of a trace, except parameters and the constants that a gate is run with again."""
    kept = {v.id for call in trace.calls for v in call.inputs if not (v.data and v.param)}
    for value in trace.values:
        if value.leaf not in {"param", "buffer"} and (value.id not in kept or value.data):
            value.tensor = None


def _return_memory() -> None:
    """Hand freed memory back to the system: what discovery kept would otherwise stay on top of the probe's own peak."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


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
) -> Report:
    """Audit a loaded model on a probe and return the report, findings and summary filled.

    ``device`` is what the report names: model and probe are there already. ``max_memory``: bytes that the activations
    of one batch may take (default, for files: half of what is free). ``progress`` is called with (batches done, batches
    in all or None). Raises EmscanError where the model cannot be audited.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}", f"use one of {', '.join(OBJECTIVES)}")
    limits = thresholds or Thresholds()
    if loaded.module is None:
        return _finished(_blank(loaded, probe, device, limits))
    model = _unwrapped(loaded.module)
    audit = _Audit(model, limits, objective, loaded.info.weights)
    quiet = foreign_code() if loaded.info.path is not None else contextlib.nullcontext()
    if probe is None:
        raise UsageError("no probe", "give inputs")
    with undisturbed(model, seed), quiet, running(model):
        for done, batch in enumerate(probe):
            try:
                if done == 0:
                    if audit.weights:
                        _check_memory(model, batch, max_memory, from_file=loaded.info.path is not None)
                    audit.discover(batch, few=True)
                if not audit.weights:
                    break  # what further batches would bring is numbers
                audit.measure(batch)
            except EmscanError:
                raise
            except Exception as error:
                if _own(error):
                    raise
                raise _model_error(error, batch) from error
            if progress is not None:
                progress(done + 1, probe.total_batches)
    report = _blank(loaded, probe, device, limits)
    report.probe.objective = audit.goal
    report.coverage = audit.coverage
    report.layers = [_layer(index, audit.rows[key], probe.info.samples) for index, key in enumerate(audit.order)]
    return _finished(report)


def probe_for(
    module: nn.Module,
    spec: str | None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> Probe:
    """Return the probe that ``spec`` names, as `open_probe`; for structure alone a few samples are enough."""
    with running(module):
        if spec is None and lacks_weights(module) and has_configuration(module):
            made = configured(module, _STRUCTURE, seed)
            info = ProbeInfo(f"synthetic: {made.describe()}", synthetic=True, seed=seed)
            return Probe(info, lambda: iter([Batch((), made.values, None, made.samples)]), 1)
        return open_probe(spec, module, batch_size=batch_size, seed=seed, device=device, trust=trust)


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


def _model_error(error: Exception, batch: Batch) -> EmscanError:
    inputs = named_inputs(batch.args, batch.kwargs).values()
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in list(inputs)[:4])
    found = user_error(error, "running the model")
    return ModelError(found.message, f"the probe gave tensors of shape {shapes}; check that --probe fits the model")


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
    allowed = limit if limit is not None else _free_memory() // 2
    if needed is not None and needed > allowed:
        raise ModelError(
            f"one batch of {batch.samples} samples needs about {needed / 2**20:,.0f} MiB of activations, "
            f"{allowed / 2**20:,.0f} MiB are allowed",
            "use a smaller --batch-size or a larger --max-memory",
        )


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def _layer(index: int, measured: _Measured, samples: int) -> Layer:
    """Return the row of the report."""
    row, site = measured.row, measured.row.site
    layer = Layer(
        index, row.name, row.module, row.composition, "none", None, row.mechanism, calls=row.calls, note=row.note
    )
    if site is None:
        return layer
    layer.verdict = site.verdict
    layer.em_compatible = site.verdict == "em"
    layer.leaky = bool(site.leaky) if site.mechanism == "threshold" else None
    layer.statistic = site.statistic
    axis = site.axes[0] if len(site.axes) == 1 and site.kind not in {"sign", "on-off", "window"} else None
    layer.alternatives = Alternatives(site.kind, site.count, axis, site.persistent)
    em = site.verdict == "em"
    layer.conditions = Conditions(True, em, em and site.differentiable)
    layer.evidence = measured.evidence
    layer.flags = list(dict.fromkeys(flag for s in row.sites for flag in s.flags))
    notes = [row.note] if row.note else []
    if site.sink:
        notes.append(f"one alternative is a sink of {'learned' if site.learned_sink else 'fixed'} energy")
    if site.kind == "batch":
        notes.append("the softmax runs over the batch")
    layer.note = "; ".join(dict.fromkeys([*notes, *site.notes])) or None
    if measured.meter is not None:
        layer.components, layer.responsibility, flags = measured.meter.finish(samples)
        layer.flags += [flag for flag in flags if flag not in layer.flags]
        if "uneven" in flags:
            layer.note = "; ".join(
                filter(None, [layer.note, "the number of units changes with the input: not measured"])
            )
    return layer


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
    Raises EmscanError (UsageError, ProbeError, ModelError) with a message and a hint.
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
            found = user_error(error, "unpacking the exported program")
            raise ModelError(found.message, "audit the module that it was exported from") from error
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
