"""EM9xx: what this audit cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from emscan.report.document import Report
from emscan.rules.registry import Hit, rule
from emscan.rules.words import listed_names


@rule("EM901", "unclassified-operator", "note")
def unclassified_operator(report: Report) -> Iterator[Hit]:
    """An operator that emscan does not know could hide a competition.

    What it finds: custom or unknown operators on values that depend on parameters.

    Why it matters: nothing is claimed about what they do; the audit is inconclusive (exit status 3).

    What to do: run the model with the plain implementation of that operator, where it has one.
    """
    for unknown in report.coverage.unclassified:
        where = f" in {unknown.where}" if unknown.where else ""
        yield Hit(
            f"{unknown.op}{where}: not classified ({unknown.calls} call{'s' if unknown.calls != 1 else ''})",
            help="audit the model with the plain implementation of this operator",
            subject=unknown.op,
        )


@rule("EM902", "nothing-classified", "note")
def nothing_classified(report: Report) -> Iterator[Hit]:
    """The audit found no layer at all.

    What it finds: a file that holds weights and no architecture, or a model in which no parametrized operation ran.

    Why it matters: no finding here means nothing was looked at.

    What to do: name the architecture with --model, or check that the probe reaches the model's layers.
    """
    if not report.layers:
        weights = not report.probe.batches  # nothing could be run: there is no module
        yield Hit(
            "weights without an architecture: nothing was run" if weights else "no parametrized operation ran",
            help=f"name the architecture: {report.weights.command}" if report.weights is not None else "",
        )


@rule("EM903", "synthetic-probe", "note")
def synthetic_probe(report: Report) -> Iterator[Hit]:
    """The probe is not data.

    What it finds: an audit without --probe: inputs were drawn at random in a shape derived from the model.

    Why it matters: verdicts hold, they depend on structure; counts of dead units and all statistics are only
    indicative, since real inputs look different.

    What to do: give a few hundred real samples with --probe.
    """
    if report.probe.synthetic and report.layers and report.model.weights:
        yield Hit(
            "the probe is synthetic: verdicts hold, counts and statistics are indicative",
            help="give real samples with --probe",
        )


@rule("EM904", "partial-probe", "note")
def partial_probe(report: Report) -> Iterator[Hit]:
    """The audit was interrupted.

    What it finds: a probe that was stopped (Ctrl-C, SIGTERM) after some of its batches.

    Why it matters: structure is told as ever, but counts and statistics are those of the batches that were done, and
    what only later batches show is missing.

    What to do: run it to the end, or give a smaller probe.
    """
    if report.probe.partial:
        yield Hit(
            f"the probe was interrupted after {report.probe.samples:,} samples: all numbers are of these alone",
            help="run it to the end, or give a smaller probe",
        )


@rule("EM905", "partial-weights", "warning")
def partial_weights(report: Report) -> Iterator[Hit]:
    """Not all weights of the model are from the file.

    What it finds: an audit with --partial in which tensors were missing or had another shape: these keep the values that
    the architecture began with.

    Why it matters: what is counted and measured in layers with such tensors, and behind them, is not of the trained
    model. Structure holds.

    What to do: name the architecture that the weights were saved from; without --partial nothing half-loaded is audited.
    """
    misfit = report.model.partial
    if misfit is None or not (misfit.missing or misfit.mismatched):
        return
    names = [*misfit.missing, *(one.name for one in misfit.mismatched)]
    yield Hit(
        f"{len(names)} tensors of the model are not from the file: {listed_names(names)}",
        help="name the architecture that the weights were saved from",
    )
