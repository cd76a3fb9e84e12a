"""Networks in the hard spellings of real code, with the rows that the theory gives them.

``CASES`` as in the other tables; a count of None matches any. ``OPEN`` names the cases whose rows can be read in more
than one way, with the other readings; ``DETACHED`` those where no gradient flows through some posterior.
"""

from __future__ import annotations

from importlib import import_module

from tests.classify.hard.common import CASES, DETACHED, OPEN

IDEAS = (
    *("attention", "blocks", "chains", "choices", "chunks", "clusters", "codes", "experts", "gates", "guards"),
    *("hidden", "mixtures", "modulation", "recurrent", "routers", "sums"),
)
for _idea in IDEAS:
    import_module(f"tests.classify.hard.{_idea}")

__all__ = ["CASES", "DETACHED", "OPEN"]
