"""Audit the architectures of the installed `transformers`, built offline from shrunken default configurations.

    python benchmarks/architectures.py                     every model type
    python benchmarks/architectures.py llama mixtral --rows
    python benchmarks/architectures.py --attention eager --experts grouped_mm --json sweep.json

One line per discrepancy and a summary: an exception, a slow audit, an inconclusive one, coverage that does not add up,
counts that differ from an independent count of operators (`operator_count.py`), and evidence that is missing or off.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch
from config_fields import has_experts
from operator_count import COUNTED, count
from shrinking import LEVELS, shrink
from torch import nn
from worker_pool import Lost, results

import emscan
from emscan.probe.configured import configured

SAMPLES = 2
SLOW = 10.0  # seconds of processor time
LIMIT = 60.0  # seconds for building, auditing and counting one model
TOLERANCE = 1e-4  # of a row's evidence, in float32
_ERRORS = ("sum_error", "gradient_error")
PARAMETERS = 40_000_000  # a model above is shrunk harder, or not built
# Which head a model type gets: the first of these tasks that it has.
_TASKS = (
    "SPEECH_SEQ_2_SEQ SEQ_TO_SEQ_CAUSAL_LM MULTIMODAL_LM IMAGE_TEXT_TO_TEXT MASKED_LM CAUSAL_LM CTC "
    "ZERO_SHOT_IMAGE_CLASSIFICATION IMAGE_CLASSIFICATION "
    "OBJECT_DETECTION VIDEO_CLASSIFICATION AUDIO_CLASSIFICATION SEMANTIC_SEGMENTATION UNIVERSAL_SEGMENTATION "
    "INSTANCE_SEGMENTATION DEPTH_ESTIMATION MASK_GENERATION ZERO_SHOT_OBJECT_DETECTION TIME_SERIES_PREDICTION "
    "TEXT_TO_WAVEFORM TEXT_TO_SPECTROGRAM SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION QUESTION_ANSWERING"
).split()

# What a default configuration must be told before it describes a model.
_FULL = {"rope_parameters": {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}}
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "detr": _RESNET,
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": _RESNET,
    "table-transformer": _RESNET,
    "chameleon": {"vocabulary_map": {"<image>": 450}},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"moe_intermediate_size": 1408},
    "cohere_compass": {"text_config": {"model_type": "cohere_compass_text", **_FULL}},
    "cohere_compass_text": _FULL,
    "autoformer": {"prediction_length": 8, "context_length": 16, "label_length": 4},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 480, "vision_end_token_id": 481},
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "llama4": {"vision_config": {"intermediate_size": 3072, "vision_output_dim": 4096}},
    "instructblipvideo": {"video_token_index": 450},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}


Job = tuple[str, str | None, str | None]  # model type, attention, experts


class SkipError(Exception):
    """A model type cannot be built here, for the reason given."""


def names() -> list[str]:
    """Return the model types that have a model class, sorted."""
    found: set[str] = set()
    for mapping in _mappings():
        found |= set(mapping)
    return sorted(found)


def names_with_experts() -> list[str]:
    """Return the model types whose configuration counts experts."""
    import transformers

    found = []
    for name in names():
        with contextlib.suppress(Exception):  # a configuration that does not stand without arguments
            if has_experts(transformers.CONFIG_MAPPING[name](**_SETTINGS.get(name, {}))):
                found.append(name)
    return found


def build(
    model_type: str, attention: str | None = None, experts: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a small model of this type in eval mode, with random weights, and inputs that it accepts, by name.

    ``attention``: "eager", "sdpa" or None for the default; ``experts``: "eager" (a loop), "grouped_mm" or None.
    Deterministic. Raises SkipError with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failures = []
        reduced = None  # a model of which a part, such as its images, was left out
        for class_name in _classes(model_type):
            for level in LEVELS:
                try:
                    model = _model(model_type, class_name, level, attention, experts)
                    made = configured(model, SAMPLES)
                    if not made.left_out:
                        return model, made.values
                    reduced = reduced or (model, made.values)
                except ImportError as error:
                    failures.append(_brief(error))
                    break
                except Exception as error:
                    failures.append(f"{class_name}: {_brief(error)}")
            if reduced is not None:
                return reduced
        raise SkipError(" | ".join(dict.fromkeys(failures)) or "no model class")


def _brief(error: BaseException) -> str:
    lines = " ".join(str(error).split())
    return f"{type(error).__name__}: {lines[:300]}"


def _mappings() -> Iterator[dict[str, Any]]:
    from transformers.models.auto import modeling_auto

    for task in _TASKS:
        yield getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    yield modeling_auto.MODEL_MAPPING_NAMES


def _classes(model_type: str) -> list[str]:
    found = []
    for mapping in _mappings():
        entry = mapping.get(model_type, ())
        found += [entry] if isinstance(entry, str) else list(entry)
    found = list(dict.fromkeys(found))
    return list(dict.fromkeys([*found[:1], *found[-1:], *found]))[:4]


def _model(model_type: str, class_name: str, level: Any, attention: str | None, experts: str | None) -> nn.Module:
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    model_class = getattr(transformers, class_name)
    config = shrink(copy.deepcopy(config_class(**_SETTINGS.get(model_type, {}))), level)
    chosen = {"attn_implementation": attention, "experts_implementation": experts}
    given = {name: value for name, value in chosen.items() if value is not None}
    with torch.device("meta"):
        weightless = model_class._from_config(copy.deepcopy(config), **given)
    size = sum(parameter.numel() for parameter in weightless.parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size:,} parameters are too many")
    torch.manual_seed(0)
    model = model_class._from_config(config, **given)
    return model.float().eval()


# -- one model ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one model. ``discrepancies``: kind and text; ``skipped``: why it could not be built."""

    name: str
    attention: str | None = None
    experts: str | None = None
    model: str = ""
    inputs: dict[str, list[int]] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    build_seconds: float = 0.0
    layers: int = 0
    discrepancies: list[tuple[str, str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    skipped: str | None = None


def examine(
    name: str,
    attention: str | None = None,
    experts: str | None = None,
    audit: bool = True,
    built: Callable[[], None] | None = None,
) -> Outcome:
    """Build, audit and count one model type; ``built()`` is called when it is built."""
    outcome = Outcome(name, attention, experts)
    start = time.perf_counter()
    try:
        model, inputs = build(name, attention, experts)
    except Exception as error:
        outcome.skipped = str(error) if isinstance(error, SkipError) else _brief(error)
        return outcome
    outcome.build_seconds = time.perf_counter() - start
    outcome.model = type(model).__name__
    outcome.inputs = {key: list(value.shape) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    outcome.parameters = sum(p.numel() for p in model.parameters())
    if not audit:
        return outcome
    if built is not None:
        built()
    start = time.process_time()  # on one thread: the wall clock also measures what else runs
    try:
        report = emscan.audit(model, inputs)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f" at {Path(where.filename).name}:{where.lineno}"
        outcome.discrepancies.append(("exception", _brief(error) + place))
        return outcome
    outcome.seconds = time.process_time() - start
    document = report.to_dict()
    outcome.layers = len(document["layers"])
    outcome.rows = [_row(layer) for layer in document["layers"] if layer["verdict"] != "none"]
    outcome.discrepancies += compare(document, count(model, inputs)) + unproven(document)
    if outcome.seconds > SLOW:
        outcome.discrepancies.append(("slow", f"{outcome.seconds:.1f} s"))
    return outcome


def compare(document: dict[str, Any], counted: Counter[str]) -> list[tuple[str, str]]:
    """Return the discrepancies of a report: inconclusive, sums and counts that are off."""
    found = []
    coverage = document["coverage"]
    if document["summary"]["status"] == "inconclusive":
        unknown = [f"{u['op']} x{u['calls']} in {u['where']}" for u in coverage["unclassified"]]
        found.append(("inconclusive", "; ".join(unknown) or "no competition found"))
    calls = {entry["op"]: entry for entry in coverage["calls"]}
    for op, entry in calls.items():
        parts = [entry[key] for key in ("in_rows", "absorbed", "control", "unclassified")]
        if sum(parts) != entry["calls"]:
            found.append(("does not add up", f"{op}: {entry['calls']} calls, {parts}"))
    for op in sorted(COUNTED):
        theirs = calls[op]["calls"] if op in calls else 0
        if theirs != counted[op]:
            found.append(("count", f"{op}: coverage says {theirs}, counted {counted[op]}"))
    return found


def unproven(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the discrepancy of a report with `em` rows whose evidence is missing or off, an empty list without any."""
    off = [layer for layer in document["layers"] if layer["verdict"] == "em" and not _proven(layer["evidence"] or {})]
    if not off:
        return []
    errors = [(off[0]["evidence"] or {}).get(name) for name in _ERRORS]
    return [("evidence", f"{len(off)} rows, as {off[0]['module']}: {off[0]['composition']}: {errors}")]


def _proven(evidence: dict[str, Any]) -> bool:
    """Whether both errors are there and small; a posterior without a gradient has none of that kind."""
    errors = [
        evidence.get(name) for name in _ERRORS if evidence.get("differentiable", True) or name != "gradient_error"
    ]
    return all(error is not None and error <= TOLERANCE for error in errors)


def _row(layer: dict[str, Any]) -> str:
    alternatives, evidence = layer["alternatives"] or {}, layer["evidence"] or {}
    k = f"K={alternatives.get('count')} {alternatives.get('kind')}"
    calls = f" x{layer['calls']}" if layer["calls"] != 1 else ""
    errors = "".join(f" {name} {evidence[name]:.0e}" for name in _ERRORS if evidence.get(name) is not None)
    note = f"  [{layer['note']}]" if layer["note"] else ""
    place = f"{layer['module'] or '-'}: {layer['composition']}"
    return f"{layer['verdict']:4} {layer['mechanism']:11} {k:22} {place}{calls}{errors}{note}"


# -- many models ----------------------------------------------------------------------------------------------------


def _job(job: Job, built: Callable[[], None], audit: bool) -> Outcome:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr
    return examine(*job, audit=audit, built=built)


def sweep(jobs: list[Job], workers: int, limit: float, audit: bool = True) -> Iterator[Outcome]:
    """Yield the outcome of every job as it ends; a crash or hang costs only its own job."""
    for result in results(functools.partial(_job, audit=audit), jobs, workers, limit):
        if not isinstance(result, Lost):
            yield result
        elif result.begun:
            yield Outcome(*result.job, discrepancies=[("exception", result.reason)])
        else:
            yield Outcome(*result.job, skipped=f"building it: {result.reason}")


def main() -> int:
    """Run the sweep; exit 1 where there is a discrepancy."""
    parser = argparse.ArgumentParser(description="Audit the architectures of the installed transformers.")
    parser.add_argument("names", nargs="*", help="model types (default: all)")
    parser.add_argument("--attention", choices=("eager", "sdpa"))
    parser.add_argument("--experts", choices=("eager", "grouped_mm", "batched_mm"), help="only types that have any")
    parser.add_argument("--limit", type=int, help="only the first N")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=LIMIT, help="time limit per model")
    parser.add_argument("--rows", action="store_true", help="print the rows that are not none")
    parser.add_argument("--build-only", action="store_true", help="build and run, no audit")
    parser.add_argument("--json", metavar="FILE", help="every outcome")
    parser.add_argument("--skipped", metavar="FILE", help="what could not be built, and why")
    options = parser.parse_args()
    chosen = (options.names or (names_with_experts() if options.experts else names()))[: options.limit]
    outcomes: list[Outcome] = []
    jobs = [(name, options.attention, options.experts) for name in chosen]
    for outcome in sweep(jobs, options.jobs, options.seconds, not options.build_only):
        outcomes.append(outcome)
        _show(outcome, options.rows, options.build_only or bool(options.names))
        if options.json and (len(outcomes) % 20 == 0 or len(outcomes) == len(jobs)):  # a long sweep may be stopped
            Path(options.json).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    _summarize(outcomes)
    if options.skipped:
        lines = [f"{o.name}\t{o.skipped}\n" for o in sorted(outcomes, key=lambda o: o.name) if o.skipped]
        Path(options.skipped).write_text("".join(lines))
    return 1 if any(outcome.discrepancies for outcome in outcomes) else 0


def _show(outcome: Outcome, rows: bool, all_of_them: bool) -> None:
    if outcome.skipped and all_of_them:
        print(f"{outcome.name}: skipped: {outcome.skipped}", flush=True)
    elif all_of_them:
        print(
            f"{outcome.name}: {outcome.model}, {outcome.parameters:,} parameters, built {outcome.build_seconds:.1f} s, "
            f"audited {outcome.seconds:.1f} s, {outcome.layers} layers, inputs {outcome.inputs}",
            flush=True,
        )
    for kind, text in outcome.discrepancies:
        print(f"{outcome.name}: {kind}: {text}", flush=True)
    for row in outcome.rows if rows else ():
        print(f"    {row}", flush=True)


def _summarize(outcomes: list[Outcome]) -> None:
    built = [outcome for outcome in outcomes if not outcome.skipped]
    clean = [outcome for outcome in built if not outcome.discrepancies]
    kinds = Counter(kind for outcome in built for kind in {kind for kind, _ in outcome.discrepancies})
    print(f"{len(outcomes)} model types: {len(built)} built and run, {len(outcomes) - len(built)} skipped")
    found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    print(f"{len(clean)} without a discrepancy; others: {found or 'none'}")
    times = sorted(outcome.seconds for outcome in built)
    if times:
        print(f"audit: median {times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
