"""Assertions for tests of one's own models: a failure names the layers and the indices of their components.

    from emscan.testing import assert_alive

    def test_units_are_alive():
        assert_alive(model, probe, max_dead="5%")

Nothing here needs pytest.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from emscan.errors import UsageError
from emscan.policy import judge, read_policy
from emscan.policy.keys import KEYS, LIMIT, named
from emscan.report.document import Finding, Limit, PolicyInfo, Report
from emscan.rules.limits import MEASURES, TOTALS, described, matches
from emscan.rules.words import listed, listed_names

if TYPE_CHECKING:
    from emscan.report.document import Thresholds

_INDICES = 60  # that a message lists of one layer


def assert_alive(
    model: Any,
    probe: Any = None,
    *,
    max_dead: int | str = 0,
    max_starved: int | str | None = None,
    layers: str | Sequence[str] = "*",
    targets: Any = None,
    objective: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    **limits: float | str,
) -> Report:
    """Assert that no more components of any layer are dead than ``max_dead``, and return the report.

    ``probe``: a tensor, tuple, dict or iterable of batches, as for `emscan.audit`. ``max_dead``, ``max_starved``: a number
    of components, or a share such as "5%" of a layer's. ``layers``: globs of the rows to look at. ``limits``: others
    that a policy has, by name: ``min_information="5%"``, ``max_violation=2``, ``max_dead_model="1%"``.
    Raises AssertionError that names layers and indices, or says that the globs match no layer with components;
    UsageError for a wrong limit.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    given = {"max_dead": max_dead, **({"max_starved": max_starved} if max_starved is not None else {}), **limits}
    globs = (layers,) if isinstance(layers, str) else tuple(layers)
    wanted = [_limit(name, value, globs) for name, value in given.items()]
    report = _audit(model, probe, targets, objective, batch_size, seed, thresholds)
    return _assert_within(report, wanted, globs)


def assert_no_findings(
    model: Any,
    probe: Any = None,
    *,
    fail_on: str | Iterable[str] = "warning",
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    targets: Any = None,
    objective: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    thresholds: Thresholds | None = None,
) -> Report:
    """Assert that nothing which ``fail_on`` names is found, and return the report.

    ``fail_on``: a level (error, warning, note; it includes worse ones) or rules; ``select`` and ``ignore``: rules, by code
    (EM101), beginning of codes (EM1) or name (dead-unit).
    """
    __tracebackhide__ = True
    chosen = {"fail-on": _texts(fail_on), "select": _texts(select), "ignore": _texts(ignore)}
    policy = read_policy(search=False, options=chosen)
    judged = judge(_audit(model, probe, targets, objective, batch_size, seed, thresholds), policy)
    assert judged.report is not None
    if judged.counted:
        number = len(judged.counted)
        raise AssertionError(_message(f"{number} finding{'s' if number > 1 else ''}", judged.counted, judged.report))
    return judged.report


def _audit(
    model: Any, probe: Any, targets: Any, objective: str | None, batch_size: int | None, seed: int,
    thresholds: Thresholds | None,
) -> Report:  # fmt: skip
    from emscan import audit

    return audit(
        model, probe, targets=targets, objective=objective, batch_size=batch_size, seed=seed, thresholds=thresholds
    )  # fmt: skip


def _limit(name: str, value: Any, globs: tuple[str, ...]) -> Limit:
    key = name.replace("_", "-")
    known = named(LIMIT)
    if key not in known:
        near = difflib.get_close_matches(name, [one.replace("-", "_") for one in known], 1)
        raise UsageError(f"no limit {name}", f"did you mean {near[0]}?" if near else "see `emscan check --help`")
    try:
        limit: Limit = KEYS[key].read(value)
    except ValueError as error:
        raise UsageError(f"{name}={value!r}", str(error)) from None
    limit.layers = None if key in TOTALS or globs == ("*",) else list(globs)
    return limit


def _assert_within(report: Report, limits: list[Limit], globs: tuple[str, ...]) -> Report:
    from emscan import rules

    __tracebackhide__ = True
    rows = [row for row in report.layers if any(matches(glob, row.name) for glob in globs)]
    if not any(MEASURES[name].read(row) for row in rows for name in MEASURES):
        names = listed_names([row.name for row in report.layers if row.verdict != "none"], 8)
        raise AssertionError(
            f"layers={', '.join(globs)}: no such layer has components; the layers are {names or 'none'}"
        )
    report.policy = PolicyInfo(limits=limits)
    rules.apply(report)
    beyond = [finding for finding in report.findings if finding.rule.startswith("EM5")]
    if beyond:
        places = {f.layer_index for f in beyond}
        some = f"{len(places)} layers are" if len(places) > 1 else "1 layer is" if places != {None} else "the model is"
        asked = ", ".join(described(one) for one in limits)
        raise AssertionError(_message(f"{some} not within {asked}", beyond, report))
    return report


def _message(first: str, findings: Sequence[Finding], report: Report) -> str:
    kind = "a synthetic probe" if report.probe.synthetic else f"a probe of {report.probe.samples:,} samples"
    lines = [f"{first}, on {kind}:"]
    for finding in findings:
        short = f" ({listed(finding.components)})" if finding.components else ""
        lines.append(f"  {finding.rule} {finding.message.replace(short, '')}")
        for where, components in _components(finding, report):
            more = len(components) - _INDICES
            indices = ", ".join(map(str, components[:_INDICES]))
            lines.append(f"    {where}indices: {indices}{f', and {more} more' if more > 0 else ''}")
    return "\n".join(lines)


def _texts(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _components(finding: Finding, report: Report) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the components of a finding; of one about the whole model, those of each layer, with its name before."""
    if finding.components:
        yield "", finding.components
    elif finding.layer_index is None:
        measure = next((one for one in MEASURES.values() if one.code == finding.rule), None)
        for row in report.layers if measure is not None else ():
            reading = measure.read(row) if measure is not None else None
            if reading is not None and reading.components:
                yield f"layer {row.name}, ", reading.components
