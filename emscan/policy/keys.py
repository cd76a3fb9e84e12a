"""Every key of a policy, in one table: files, environment and options are read by it, and help is written from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from emscan.policy.selectors import level_or_selector, selector
from emscan.report.document import Limit, Thresholds
from emscan.report.schema import BOUNDS
from emscan.rules.limits import MEASURES, TOTALS

OBJECTIVES = ("auto", "cross-entropy", "bce", "free-energy", "none")
RULES_OPTION, RUN, LIMIT, THRESHOLD, FILES = "rules", "run", "limit", "threshold", "files"


@dataclass(frozen=True)
class Key:
    """A key: ``parse`` makes its value from what TOML or text gives, or raises ValueError that says what to write.

    ``many``: a list; text is split at commas. ``flag``: true or false. ``group``: one of the constants above.
    """

    name: str
    group: str
    parse: Callable[[Any], Any]
    what: str
    form: str = "TEXT"
    many: bool = False
    flag: bool = False

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "EMSCAN_" + self.name.upper().replace("-", "_")

    def read(self, value: Any) -> Any:
        """Return the value of the key; raises ValueError that says what to write instead."""
        if not self.many:
            return self.parse(value)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise ValueError('write a list, e.g. ["..."]')
        return tuple(self.parse(one) for one in value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError('write text, e.g. "..."')
    return value


def _rule(value: Any) -> str:
    return selector(_text(value))


def _level(value: Any) -> str:
    return level_or_selector(_text(value))


def _objective(value: Any) -> str:
    if value not in OBJECTIVES:
        raise ValueError(f"use one of {', '.join(OBJECTIVES)}")
    return str(value)


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in {"1", "true", "yes", "0", "false", "no"}:
        return value.lower() in {"1", "true", "yes"}
    if not isinstance(value, bool):
        raise ValueError("write true or false")
    return value


def _whole(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"write a whole number of {least} or more")
        return number

    return parse


def _size(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _number(value: Any) -> tuple[float, bool]:
    """Return a number and whether it was a share: "5%" is 0.05."""
    share = isinstance(value, str) and value.strip().endswith("%")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value.strip().rstrip("%")) if isinstance(value, str) else float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError
    return (number / 100, True) if share else (number, False)


def _limit(name: str) -> Callable[[Any], Limit]:
    measure = MEASURES[TOTALS.get(name, name)]

    def parse(value: Any) -> Limit:
        if value == "off":
            return Limit(name, None)
        try:
            number, share = _number(value)
        except ValueError:
            number, share = math.nan, False
        fits = not math.isnan(number) and (not share or number <= 1)
        if measure.counts and not (fits and (share or number.is_integer())):
            raise ValueError('write a share such as "5%", a whole number of components, or "off"')
        if not fits or (share and not measure.shares):
            raise ValueError(f'write a number{_or_share(name)}, or "off"')
        return Limit(name, number, share)

    return parse


def _or_share(name: str) -> str:
    return ' or a share such as "5%"' if MEASURES[TOTALS.get(name, name)].shares else ""


def _threshold(name: str) -> Callable[[Any], float]:
    most = BOUNDS.get(("Thresholds", name), {}).get("maximum", math.inf)

    def parse(value: Any) -> float:
        try:
            number, _ = _number(value)
        except ValueError:
            number = math.nan
        if not number <= most:  # NaN is none either
            raise ValueError("write a share from 0 to 1" if most == 1 else "write a number of 0 or more")
        return number

    return parse


def _limit_help(name: str) -> str:
    measure = MEASURES[TOTALS.get(name, name)]
    if name in TOTALS:
        return f"Most {measure.what} components of the whole model ({measure.code})."
    return f"{measure.asks.rstrip('.')} ({measure.code})."


def _limit_form(name: str) -> str:
    measure = MEASURES[TOTALS.get(name, name)]
    return "N|SHARE%" if measure.shares else "N"


_THRESHOLDS = {
    "rare": "A unit on for less than this share of values is rare.",
    "dormant": "Mean output at or below this share of the layer's: dormant.",
    "starved": "Load below this share of 1/K: starved.",
    "hard": "max r at or above this: a hard competition.",
    "saturated": "Two-way r at or above this: saturated.",
    "confidence": "Level of the bound on how often an unseen unit fires.",
    "collapse_variance": "Variance of every component below this: collapse.",
    "information": "Information below this share of ln K is near 0.",
    "redundancy": "Redundancy at or above this is a finding.",
    "calibration": "Expected calibration error above this is a finding.",
    "sink": "More mean mass on the first key: a sink head.",
    "collapsed_head": "Mean normalized entropy below this: a collapsed head.",
    "uniform_head": "Mean normalized entropy above this: a uniform head.",
    "inactive_head": "Output below this share of the heads' mean: inactive.",
    "evidence": "Tolerance of evidence, in epsilons of the dtype times sqrt(K).",
}
_KEYS = (
    Key("select", RULES_OPTION, _rule, "Only these rules: codes, beginnings of codes (EM1) or names.", "RULE", many=True),
    Key("ignore", RULES_OPTION, _rule, "Suppress these rules.", "RULE", many=True),
    Key("fail-on", RULES_OPTION, _level, "What counts as a finding: a level or rules; without it, warning.",
        "LEVEL|RULE", many=True),
    Key("probe", RUN, _text, "What to run the models on.", "SPEC"),
    Key("probe-arg", RUN, _text, "How to read images or text.", "NAME=VALUE", many=True),
    Key("objective", RUN, _objective, "The training objective on the output.", "|".join(OBJECTIVES)),
    Key("model", RUN, _text, "The architecture, for files of weights alone.", "TARGET"),
    Key("model-arg", RUN, _text, "An argument for that callable.", "NAME=VALUE", many=True),
    Key("partial", RUN, _flag, "Audit what fits where weights do not fill the architecture.", flag=True),
    Key("batch-size", RUN, _whole(1), "Samples at a time.", "N"),
    Key("device", RUN, _text, "Where to run, e.g. cpu or cuda.", "D"),
    Key("seed", RUN, _whole(0), "Seed of synthetic probes and of randomness in the model.", "N"),
    Key("max-memory", RUN, _size, "Most memory for activations, e.g. 4G.", "SIZE"),
    Key("skip", FILES, _text, "Leave out models whose path matches.", "GLOB", many=True),
    Key("skip-unsupported", FILES, _flag, "Leave out files of a kind that emscan does not read.", flag=True),
    Key("baseline", FILES, _text, "Only what is new or worse than in these reports counts.", "REPORT", many=True),
    *(Key(name, LIMIT, _limit(name), _limit_help(name), _limit_form(name)) for name in (*MEASURES, *TOTALS)),
    *(
        Key(name.replace("_", "-"), THRESHOLD, _threshold(name), f"{what} Default {getattr(Thresholds, name):g}.", "NUMBER")
        for name, what in _THRESHOLDS.items()
    ),
)  # fmt: skip
KEYS: Mapping[str, Key] = {key.name: key for key in _KEYS}


def named(*groups: str) -> dict[str, Key]:
    """Return the keys of some groups, by name."""
    return {name: key for name, key in KEYS.items() if key.group in groups}
