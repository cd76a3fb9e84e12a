"""What a project asks of its models: read from a file, the environment and options, and applied to a report.

No torch here. `read_policy` gives a `Policy`, `judge` applies it to a report, `stale` says which of it did nothing.
"""

from __future__ import annotations

from emscan.policy.document import Applied, Policy
from emscan.policy.judge import OUTCOMES, Judgement, Outcome, judge, stale
from emscan.policy.read import read_policy

__all__ = ["OUTCOMES", "Applied", "Judgement", "Outcome", "Policy", "judge", "read_policy", "stale"]
