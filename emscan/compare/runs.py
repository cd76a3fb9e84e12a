"""What kept two audits from being of the same thing, in sentences: their numbers then differ for that reason, too."""

from __future__ import annotations

import dataclasses

from emscan.report.document import ProbeInfo, Report


def same_probe(old: ProbeInfo, new: ProbeInfo) -> bool:
    """Whether both ran on the same samples, as far as the reports tell."""
    return not _probes(old, new)


def differences(old: Report, new: Report, was: str = "the old report", is_: str = "the new one") -> list[str]:
    """Return what differs between two runs besides the model, a sentence each; ``was``, ``is_``: what to call them."""
    said = [f"{is_} {text.format(was=was)}" for text in _probes(old.probe, new.probe)]
    if (old.probe.objective or "none") != (new.probe.objective or "none"):
        goals = (new.probe.objective or "none", old.probe.objective or "none")
        said.append(f"{is_} was audited with objective {goals[0]}, {was} with {goals[1]}")
    changed = [
        f"{field.name} {getattr(new.thresholds, field.name):g} (was {getattr(old.thresholds, field.name):g})"
        for field in dataclasses.fields(old.thresholds)
        if getattr(old.thresholds, field.name) != getattr(new.thresholds, field.name)
    ]
    if changed:
        said.append(f"other thresholds: {', '.join(changed)}")
    if (_blind(old) or "") != (_blind(new) or ""):
        said += [f"{name} has {why}" for name, why in ((was, _blind(old)), (is_, _blind(new))) if why]
    return said


def _blind(report: Report) -> str | None:
    """Return why a report has no numbers."""
    if report.weights is not None:
        return "no architecture: nothing was run"
    return None if report.model.weights else "no weights: nothing was measured"


def _probes(old: ProbeInfo, new: ProbeInfo) -> list[str]:
    if old.synthetic != new.synthetic:
        kinds = ("a synthetic probe", "a probe of data")
        return [f"ran on {kinds[not new.synthetic]}, {{was}} on {kinds[not old.synthetic]}"]
    said = []
    if old.synthetic and old.seed != new.seed:
        said.append(f"ran on a synthetic probe of seed {_plain(new.seed)}, {{was}} on one of seed {_plain(old.seed)}")
    elif old.samples != new.samples:
        said.append(f"ran on {new.samples:,} samples, {{was}} on {old.samples:,}")
    elif old.sha256 != new.sha256 and old.sha256 and new.sha256:
        said.append("ran on another probe than {was} (their sha256 differ)")
    elif old.source != new.source and not (old.sha256 and new.sha256):
        said.append(f"ran on the probe {_braced(new.source)}, {{was}} on {_braced(old.source)}")
    if old.partial != new.partial:
        said.append(f"{'was' if new.partial else 'was not'} interrupted, {{was}} {'was' if old.partial else 'was not'}")
    return said


def _plain(seed: int | None) -> str:
    return "none" if seed is None else str(seed)


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
