"""The JSON Schema of an inspection, derived from its data classes as that of the report is.

``inspect.schema.json`` beside this file is a copy for those who only read: `emscan schema inspect` writes it, a test
compares.
"""

from __future__ import annotations

from typing import Any

from emscan.inspect.document import SCHEMA_VERSION, Inspection
from emscan.report.schema import Bounds, derived

_NOT_NEGATIVE = {"minimum": 0}
_BOUNDS: Bounds = {
    ("Inspection", "tool"): {"required": ["name", "version"]},
    ("Inspection", "bytes"): _NOT_NEGATIVE,
    ("FileInfo", "bytes"): _NOT_NEGATIVE,
    **{("TensorInfo", name): _NOT_NEGATIVE for name in ("shape", "bytes", "nan", "inf")},
    **{("Totals", name): _NOT_NEGATIVE for name in ("tensors", "parameters", "bytes")},
}


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of inspection version 1; it rejects unknown and missing fields."""
    return derived(
        Inspection, SCHEMA_VERSION, _BOUNDS, "emscan inspection",
        "What emscan inspect --format json writes. Sizes in bytes; null where a thing does not apply or is not known.",
    )  # fmt: skip
