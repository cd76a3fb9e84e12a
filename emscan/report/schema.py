"""The JSON Schema of the report, derived from its data classes so that the two cannot differ.

``report.schema.json`` beside this file is a copy for those who only read: `emscan schema` writes it, a test compares.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from emscan.report.document import SCHEMA_VERSION, Report

# Bounds that the types do not say: (class, field) -> schema of the value, or of every entry of a list.
_SHARE = {"minimum": 0, "maximum": 1}
_NOT_NEGATIVE = {"minimum": 0}
Bounds = dict[tuple[str, str], dict[str, Any]]
BOUNDS: Bounds = {
    ("Report", "tool"): {"required": ["name", "version"]},
    **{("Thresholds", name): _SHARE for name in ("rare", "dormant", "starved", "hard", "saturated", "confidence")},
    **{("Thresholds", name): _SHARE for name in ("sink", "collapsed_head", "uniform_head", "inactive_head")},
    ("Thresholds", "redundancy"): _SHARE,
    **{("Thresholds", name): _NOT_NEGATIVE for name in ("collapse_variance", "information", "evidence")},
    **{("Components", name): _SHARE for name in ("on_rate", "upper_bound", "load", "soft_load")},
    **{("Components", name): _SHARE for name in ("redundancy", "redundancy_centred")},
    **{("Components", name): _NOT_NEGATIVE for name in ("variance", "mass", "correlation_energy", "correlated")},
    ("Components", "count"): _NOT_NEGATIVE,
    **{
        ("Components", name): _NOT_NEGATIVE
        for name in ("dead", "rare", "dormant", "linear", "starved", "frozen", "provably_dead", "copies")
    },
    **{("EntropySummary", name): _NOT_NEGATIVE for name in ("mean", "min", "p05", "median", "p95", "max")},
    **{("MaxSummary", name): _SHARE for name in ("mean", "p95")},
    **{("Responsibility", name): _SHARE for name in ("hard_fraction", "saturated", "mean", "dropped")},
    **{
        ("Responsibility", name): _NOT_NEGATIVE
        for name in ("competitions", "information", "effective_components", "load_entropy")
    },
    **{("Temperature", name): _NOT_NEGATIVE for name in ("half", "double", "sampled")},
    **{("Calibration", name): _SHARE for name in ("accuracy", "confidence", "error")},
    **{("Head", name): _SHARE for name in ("first_key", "diagonal", "hard_fraction", "uniform_first_key")},
    **{("Evidence", name): _NOT_NEGATIVE for name in ("sum_error", "gradient_error", "tolerance")},
    **{("OpCount", name): _NOT_NEGATIVE for name in ("calls", "in_rows", "absorbed", "control", "unclassified")},
    **{("ProbeInfo", name): _NOT_NEGATIVE for name in ("samples", "batches")},
    ("ModelInfo", "parameters"): _NOT_NEGATIVE,
    ("ModelInfo", "sha256"): {"pattern": "^[0-9a-f]{64}$"},
    ("ProbeInfo", "sha256"): {"pattern": "^[0-9a-f]{64}$"},
    ("Layer", "calls"): {"minimum": 1},
    ("Layer", "index"): _NOT_NEGATIVE,
    ("Alternatives", "count"): {"minimum": 1},
    ("Unclassified", "calls"): {"minimum": 1},
    **{
        ("Summary", name): _NOT_NEGATIVE
        for name in ("layers", "em", "em_two_way", "soft", "hard", "none", "components", "dead", "starved", "findings")
    },
    ("Finding", "rule"): {"pattern": "^EM[0-9]{3}$"},
    ("Finding", "fingerprint"): {"pattern": "^v1:EM[0-9]{3}:[0-9a-f]{16}(:[0-9]+)?$"},
    ("Finding", "layer_index"): _NOT_NEGATIVE,
    ("Finding", "components"): _NOT_NEGATIVE,
}


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of report version 1; it rejects unknown and missing fields."""
    return derived(
        Report, SCHEMA_VERSION, BOUNDS, "emscan report",
        "What emscan audit --format json writes. Entropies in nats; null where a number does not apply.",
    )  # fmt: skip


def derived(cls: type, version: int, bounds: Bounds, title: str, description: str) -> dict[str, Any]:
    """Return the JSON Schema of a document's data class; ``bounds``: what the types do not say."""
    definitions: dict[str, Any] = {}
    root = _object(cls, definitions, bounds)
    root["properties"] = {"schema_version": {"const": version}, **root["properties"]}
    root["required"] = ["schema_version", *root["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "description": description,
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _object(cls: type, definitions: dict[str, Any], table: Bounds) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties = {  # a trailing underscore is Python's alone
        f.name.rstrip("_"): _value(hints[f.name], definitions, table.get((cls.__name__, f.name), {}), table)
        for f in dataclasses.fields(cls)
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _value(kind: Any, definitions: dict[str, Any], bounds: dict[str, Any], table: Bounds) -> dict[str, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        return {"anyOf": [_value(arg, definitions, bounds, table) for arg in args]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _value(args[0], definitions, bounds, table)}
    if origin is dict:
        values = {} if args[1] is Any else {"additionalProperties": _value(args[1], definitions, {}, table)}
        return {"type": "object", **values, **bounds}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}
            definitions[kind.__name__] = _object(kind, definitions, table)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    limits = {} if kind in {bool, type(None)} else bounds
    return {"type": names[kind], **limits}
