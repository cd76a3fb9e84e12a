"""Models without weights: integers and masks stay real, everything that a weight takes part in has a shape only."""

from __future__ import annotations

from emscan.shapeless.build import TooManyPartsError, blueprint, lacks_weights, shapeless, without_weights
from emscan.shapeless.tensors import is_shapeless

__all__ = ["TooManyPartsError", "blueprint", "is_shapeless", "lacks_weights", "shapeless", "without_weights"]
