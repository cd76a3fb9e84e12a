"""Smooth gates that no log-sum-exp computes: both sides keep a share, but nothing exponentiates and normalizes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from emscan.classify.curve import Curve, Function
from emscan.classify.site import GateForm

NAMES: dict[str, Function] = {
    "GELU": F.gelu,
    "Softsign": F.softsign,
    "Erf": torch.erf,
    "Arctan": torch.atan,
    "Normal CDF": lambda z: (1 + torch.erf(z / math.sqrt(2))) / 2,
}
_NEAR = "GELU in its erf form: the tanh form is two-way log-sum-exp and differs from it in form, hardly in value"


def recognize(curve: Curve) -> GateForm | None:
    """Return the form of a gate whose two sides differ and that is neither piecewise nor logistic."""
    if not curve.two_sided:
        return None
    names = [name for name, function in NAMES.items() if curve.scaled(function)]
    label = names[0] if names else "Smooth gate"
    signed = bool(((curve.y > 0) == (curve.z > 0)).all())
    return GateForm(label, curve.function, output_tells=signed, note=_NEAR if label == "GELU" else None)
