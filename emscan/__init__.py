"""emscan: where a neural network has expectation-maximization structure, and which of its components are dead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emscan._version import __version__

if TYPE_CHECKING:
    from emscan.pipeline import audit
    from emscan.report.document import Report

__all__ = ["Report", "__version__", "audit"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import emscan` alone does not import torch."""
    if name == "audit":
        from emscan.pipeline import audit

        return audit
    if name == "Report":
        from emscan.report.document import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
