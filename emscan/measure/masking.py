"""Whether a model masks scores with finite numbers, by what lies between the product that makes them and the softmax.

A score far below the best is a mask's only where something can have put it there. Learned scores can be that far apart,
too: then the key is in sight, with a share of next to nothing. Minus infinity always masks, and tells itself.
"""

from __future__ import annotations

import math

from emscan.classify.flow import ADDS, DIVISIONS, MASKS, PRODUCTS, SCATTERS, ancestors, mixes
from emscan.classify.site import Site
from emscan.measure.alternatives import MASKED
from emscan.trace.graph import Call, Value
from emscan.trace.operators import NORMALIZATION, REDUCTION

_WRITES = frozenset(f"aten.{name}" for name in "tril triu pad constant_pad_nd".split())
_FACTORS = PRODUCTS | DIVISIONS


def can_mask(site: Site) -> bool:
    """Whether a constant, a comparison or the input itself is written into, added to or multiplied with the scores."""
    start = site.weights if site.weights is not None else site.energies
    way = (v.call for v in ancestors(start, lambda call: not _makes(call)) if v.param and v.floating)
    return any(call is not None and not _makes(call) and _masks(call) for call in way)


def _makes(call: Call) -> bool:
    """Whether a call makes scores out of something else."""
    return mixes(call) or call.op in REDUCTION or call.op in NORMALIZATION


def _masks(call: Call) -> bool:
    if call.op in MASKS:
        return not any(_infinite(operand) for operand in (*call.args[1:], *call.kwargs.values()))
    if call.op in SCATTERS or call.op in _WRITES or call.op == "emscan.mutated":
        return True
    if any(not v.floating and v.shape for v in call.inputs) and any(v.floating for v in call.outputs):
        return True
    if call.op in ADDS:
        return any(not v.param and v.shape and _hides(v, adds=True) for v in call.inputs)
    return call.op in _FACTORS and any(
        not v.param and math.prod(v.shape) > 1 and _hides(v, adds=False) for v in call.inputs
    )


def _hides(operand: Value, *, adds: bool) -> bool:
    """Whether some entries can be a mask's: those of the input always, those of a constant by their size.

    ``adds``: far below others, else zero. A single entry does not tell what a longer batch brings.
    """
    numbers = operand.tensor
    if operand.data or numbers is None or numbers.numel() < 2 or not numbers.is_floating_point():
        return True
    known = numbers[numbers.isfinite()]
    if not known.numel():
        return False
    return bool(known.max() - known.min() >= MASKED) if adds else bool((numbers == 0).any())


def _infinite(operand: object) -> bool:
    """Whether an operand is the number -inf."""
    if isinstance(operand, Value):
        tensor = operand.tensor if not operand.shape else None
        return tensor is not None and tensor.is_floating_point() and float(tensor) == -math.inf
    return operand == -math.inf
