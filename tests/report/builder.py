"""Reports made by hand, without torch."""

from __future__ import annotations

from emscan import rules
from emscan.report.document import (
    Alternatives,
    Components,
    Conditions,
    Coverage,
    EntropySummary,
    Evidence,
    Head,
    Layer,
    MaxSummary,
    ModelInfo,
    OpCount,
    ProbeInfo,
    Report,
    Responsibility,
    Thresholds,
    Unclassified,
)


def gate(index: int, name: str, *, count: int = 8, **lists: list[int]) -> Layer:
    layer = Layer(index, name, name, "Linear + ReLU", "hard", False, "threshold", leaky=False, statistic="gate")
    layer.alternatives = Alternatives("on-off", 2)
    layer.conditions = Conditions(True, False, False)
    layer.components = Components("units", count, on_rate=[0.25] * count, **lists)
    return layer


def softmax(index: int, name: str, *, count: int = 10, kind: str = "classes") -> Layer:
    layer = Layer(index, name, None, "Linear + Softmax + Cross-Entropy", "em", True, "softmax", statistic="log")
    layer.alternatives = Alternatives(kind, count, -1, True)
    layer.conditions = Conditions(True, True, True)
    layer.evidence = Evidence("cross-entropy", None, 1e-7, 2e-7, 1e-5, "float32", True)
    layer.components = Components("classes", count, load=[1 / count] * count)
    layer.responsibility = Responsibility(
        100,
        EntropySummary(1.0, 0.1, 0.2, 0.9, 1.8, 2.0),
        0.43,
        9.5,
        0.8,
        MaxSummary(0.6, 0.99),
        0.1,
        heads=[Head(0.5, 0.1, 0.2, 0.0, 1.0)],
    )
    return layer


def plain(index: int, name: str) -> Layer:
    return Layer(index, name, name, "Linear", "none", None, "affine")


def report(*layers: Layer, synthetic: bool = False, unclassified: tuple[str, ...] = (), samples: int = 100) -> Report:
    made = Report(
        {"name": "emscan", "version": "0"},
        {"python": "3.11", "threads": 1},
        Thresholds(),
        ModelInfo("model.pt", "torch-module", "0" * 64, 1234),
        ProbeInfo("probe.safetensors", synthetic, samples, 2, 0),
        list(layers),
        Coverage([OpCount("aten.relu", 2, 1, 1)], [Unclassified(op, "block", 1) for op in unclassified]),
    )
    rules.apply(made)
    return made


def seed(**options: bool) -> Report:
    """The table that the theory starts from."""
    rows = [gate(0, "0", dead=[1, 5]), gate(1, "2"), gate(2, "4", rare=[3])]
    return report(*rows, softmax(3, "6"), plain(4, "extra"), **options)
