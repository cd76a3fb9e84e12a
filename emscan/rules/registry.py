"""The rules: one function each, registered with a code; its docstring is the page that `emscan rule CODE` prints."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from emscan.report.document import Finding, Layer, Level, Report


@dataclass(frozen=True)
class Hit:
    """What a rule found: a message, the row it is about, the components concerned, what to do.

    ``subject`` names what the finding is about where that is no row; it tells fingerprints apart.
    """

    message: str
    layer: Layer | None = None
    components: tuple[int, ...] = ()
    help: str = ""
    subject: str = ""


Check = Callable[[Report], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """A registered rule."""

    code: str
    name: str
    level: Level
    check: Check

    @property
    def page(self) -> str:
        """The rule explained."""
        return inspect.cleandoc(self.check.__doc__ or "")

    def findings(self, report: Report) -> Iterator[Finding]:
        """Run the rule on a report."""
        seen: Counter[str] = Counter()
        for hit in self.check(report):
            layer = hit.layer
            fingerprint = self._fingerprint(hit)
            seen[fingerprint] += 1
            if seen[fingerprint] > 1:  # two gates on one layer are two findings
                fingerprint = f"{fingerprint}:{seen[fingerprint]}"
            yield Finding(
                self.code,
                self.level,
                hit.message,
                layer.name if layer is not None else None,
                layer.index if layer is not None else None,
                list(hit.components),
                fingerprint,
                hit.help,
            )

    def _fingerprint(self, hit: Hit) -> str:
        """The same finding in the next report has the same fingerprint: no number takes part in it."""
        layer = hit.layer
        about = (layer.name, layer.composition, layer.mechanism) if layer is not None else (hit.subject,)
        digest = hashlib.sha256("\0".join((self.code, *about)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return f"v1:{self.code}:{digest}"


RULES: dict[str, Rule] = {}


def rule(code: str, name: str, level: Level) -> Callable[[Check], Check]:
    """Register a rule; a code that is taken raises ValueError."""

    def register(check: Check) -> Check:
        if code in RULES:
            raise ValueError(f"{code} is registered twice")
        RULES[code] = Rule(code, name, level, check)
        return check

    return register
