"""From a Hugging Face configuration to a model: classes of the installed transformers, built offline.

A configuration is untrusted: it names a type of model and an architecture, and both are looked up in transformers'
own tables. What would fetch or run other code (`auto_map`, kernels, a pretrained backbone) is left out, or refused
where the model cannot be had without it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emscan.load.fit import describe
from emscan.load.source import RefusalError, UnsafeError, brief, listing, printable
from emscan.report.document import Misfit, Mismatch
from emscan.shapeless import blueprint, without_weights

_NAME = re.compile(r"[A-Za-z_]\w{0,200}")
# What says how and from where to run a model rather than what the model is.
_LEFT_OUT = frozenset(
    "auto_map attn_implementation experts_implementation quantization_config fusion_config kernel_config use_kernels "
    "transformers_weights name_or_path distributed_config".split()
)
_LARGER, _SPARE = 4, 2**23  # a model may have this many times the parameters of its weights, and a few more
_EXTRA = "pip install 'emscan[transformers]'"


@dataclass
class Plan:
    """What to build: a class and its configuration; ``notes`` say what of the file was left out."""

    kind: Any
    config: Any
    notes: list[str] = field(default_factory=list)
    trusted: bool = False


def plan(fields: dict[str, Any], folder: Path | None, *, trust: bool, weights: bool) -> Plan:
    """Return what a configuration describes. ``weights``: whether they will be loaded, not only shapes.

    Raises RefusalError where transformers is missing or does not know the model, UnsafeError where the model is code
    of its own and ``trust`` is not given.
    """
    _require()
    notes = []
    if fields.get("quantization_config"):
        if weights:
            method = printable((fields["quantization_config"] or {}).get("quant_method", "an unknown method"), 40)
            raise RefusalError(f"its weights are quantized ({method})", "give its config.json to audit the structure")
        notes.append("the quantization of the weights is left out: the structure is that of the plain model")
    with offline():
        try:
            found = _known(fields)
        except RefusalError:
            if not fields.get("auto_map"):
                raise
            return _own_code(fields, folder, trust)
    if fields.get("auto_map"):
        notes.append("transformers knows this architecture: the code that auto_map names is not used")
    return Plan(*found, notes)


def build(plan: Plan) -> nn.Module:
    """Return the model with all its weights on the meta device: nothing is allocated for them."""
    from transformers.initialization import no_init_weights

    with offline(), _building(plan), no_init_weights(), blueprint():
        module = plan.kind._from_config(plan.config)
        module.tie_weights()
    return without_weights(module)


def load(
    plan: Plan, weights: dict[str, Tensor], *, partial: bool = False
) -> tuple[nn.Module, list[str], Misfit | None]:
    """Return the model with its weights, old names translated as transformers does; notes; and what did not fit.

    Raises RefusalError where the weights do not fill the model, unless ``partial`` allows it.
    """
    _check_size(plan, weights)
    with offline(), _building(plan):
        module, info = plan.kind.from_pretrained(
            None, config=plan.config, state_dict=weights, output_loading_info=True, local_files_only=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    clashing = [Mismatch(str(n), list(ours), list(theirs)) for n, ours, theirs in info["mismatched_keys"]]
    missing, left = (sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys"))
    if info["error_msgs"]:
        raise RefusalError(f"its weights do not load ({printable(info['error_msgs'][0])})", "check the folder")
    notes = [f"tensors that a {plan.kind.__name__} does not have were left out: {listing(left)}"] if left else []
    if not missing and not clashing:
        return module, notes, None
    misfit = Misfit(max(0, len(weights) - len(left) - len(clashing)), missing, left, clashing)
    said = describe(dataclasses.replace(misfit, unexpected=[]))
    if not partial:
        raise RefusalError(
            f"its weights do not fill a {plan.kind.__name__}: {said}",
            "check the folder, or pass --partial to audit what fits",
        )
    return module, [*notes, f"with --partial, {misfit.loaded} tensors were loaded; {said}"], misfit


def _check_size(plan: Plan, weights: dict[str, Tensor]) -> None:
    """Refuse a configuration far larger than the weights: transformers would allocate what they do not fill."""
    wanted = sum(tensor.numel() for tensor in build(plan).parameters())
    held = sum(tensor.numel() for tensor in weights.values())
    if wanted > _LARGER * held + _SPARE:
        raise RefusalError(
            f"its configuration describes {wanted:,} parameters, its weights are {held:,}", "check the folder"
        )


def _require() -> None:
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        missing = error.name == "transformers" or isinstance(error, ModuleNotFoundError)
        what = "which is not installed" if missing else f"which does not import ({brief(error)})"
        raise RefusalError(
            f"its architecture is in transformers, {what}", f"install emscan[transformers]: {_EXTRA}"
        ) from None


# -- looking up ---------------------------------------------------------------------------------------------------


def _known(fields: dict[str, Any]) -> tuple[Any, Any]:
    """Return class and configuration from transformers' own tables."""
    kind_name = _architecture(fields)
    model_type = fields.get("model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type is None and kind_name is None:
        raise RefusalError(
            "its configuration has neither model_type nor architectures", "give the config.json of a model"
        )
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise RefusalError(
            f"its model_type {printable(model_type, 60)!r} is unknown to transformers {_version()}",
            "a newer transformers may know it",
        )
    kind = _class(kind_name, "") if model_type is None else None
    config_class: Any = kind.config_class if kind is not None else CONFIG_MAPPING[str(model_type)]
    if config_class is None:
        raise RefusalError("its configuration has no model_type", "give the config.json of a model")
    config = _configured(config_class, fields)
    if kind is None:
        kind = _class(kind_name, config_class.__module__) if kind_name is not None else _default(config)
    expected = getattr(kind, "config_class", None)
    if isinstance(expected, type) and not isinstance(config, expected):
        raise RefusalError(
            f"its architecture {kind.__name__} does not go with its model_type {printable(model_type, 60)!r}",
            "correct the configuration",
        )
    return kind, config


def _architecture(fields: dict[str, Any]) -> str | None:
    names = fields.get("architectures")
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str) or not _NAME.fullmatch(names[0]):
        raise RefusalError("its architectures are no names of classes", "correct the configuration")
    return names[0]


def _class(name: str | None, config_module: str) -> Any:
    """Return the model class of that name: one that transformers exports, or that stands beside the configuration."""
    import transformers
    from transformers import PreTrainedModel

    found: Any = None
    with contextlib.suppress(AttributeError):
        found = getattr(transformers, str(name))
    if found is None and ".configuration_" in config_module:
        with contextlib.suppress(ImportError):
            beside = importlib.import_module(config_module.replace(".configuration_", ".modeling_"))
            found = getattr(beside, str(name), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__module__.startswith("transformers."):
        return found
    reason = (
        "needs a package that is not installed" if found is not None else f"is unknown to transformers {_version()}"
    )
    raise RefusalError(f"its architecture {printable(name, 60)} {reason}", "a newer transformers may know it")


def _default(config: Any) -> Any:
    """Return the class that transformers takes for a configuration which names no architecture."""
    from transformers.models.auto import modeling_auto

    names = [name for name in vars(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING")]
    for name in ("MODEL_MAPPING", *names):
        table = getattr(modeling_auto, name)
        if type(config) in table:
            found = table[type(config)]
            return found[0] if isinstance(found, list | tuple) else found
    raise RefusalError(f"transformers has no model for a {type(config).__name__}", "name the class in `architectures`")


def _configured(config_class: Any, fields: dict[str, Any]) -> Any:
    try:
        return config_class.from_dict(_stripped(fields))
    except Exception as error:  # whatever transformers raises on fields of a wrong type or value
        raise RefusalError(f"its configuration is wrong ({brief(error)})", "correct the configuration") from None


def _stripped(fields: Any) -> Any:
    """Return a copy of nested fields without what is not part of the model."""
    if isinstance(fields, list):
        return [_stripped(item) for item in fields]
    if not isinstance(fields, dict):
        return copy.copy(fields)
    kept = {
        name: _stripped(value) for name, value in fields.items() if name not in _LEFT_OUT and not name.startswith("_")
    }
    if "use_pretrained_backbone" in kept:
        kept["use_pretrained_backbone"] = False  # its weights are in the folder, if anywhere
    return kept


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _own_code(fields: dict[str, Any], folder: Path | None, trust: bool) -> Plan:
    """Return what a folder's own code describes, which only the user can allow to run."""
    if not trust:
        raise UnsafeError(
            "its architecture is Python code of its own (auto_map), and not part of transformers",
            "if you trust where it comes from, pass --trust",
        )
    table = fields["auto_map"]
    wanted = (
        next((name for name in table if str(name).startswith("AutoModel")), None) if isinstance(table, dict) else None
    )
    if folder is None or wanted is None or "AutoConfig" not in table:
        raise RefusalError(
            "its code (auto_map) is not in a folder", "give the folder that holds config.json and its code"
        )
    if any("--" in str(table[name]) for name in ("AutoConfig", wanted)):
        raise RefusalError("its code (auto_map) lies in another repository", "copy that code into the folder")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with offline():
        try:
            config_class, kind = (
                get_class_from_dynamic_module(str(table[name]), str(folder), local_files_only=True)
                for name in ("AutoConfig", wanted)
            )
        except Exception as error:  # the folder's own code
            raise RefusalError(f"its own code does not import ({brief(error)})", "mend it there") from None
        return Plan(kind, _configured(config_class, fields), [], trusted=True)


# -- transformers, kept quiet and offline -----------------------------------------------------------------------------


@contextlib.contextmanager
def _building(plan: Plan) -> Iterator[None]:
    """Turn whatever transformers raises on a model that cannot be built into a RefusalError."""
    try:
        yield
    except RefusalError:
        raise
    except Exception as error:
        raise RefusalError(
            f"transformers cannot build its {plan.kind.__name__} ({brief(error)})", "check the configuration"
        ) from None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep transformers from the network, and its notes and progress from the terminal."""
    from huggingface_hub import constants

    logging: Any = importlib.import_module("transformers.utils.logging")
    before = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        logging.set_verbosity(before[1])
        if before[2]:
            logging.enable_progress_bar()
