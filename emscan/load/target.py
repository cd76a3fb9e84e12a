"""The architecture that `--model TARGET` names: the user's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from emscan.errors import ModelError, UsageError
from emscan.usercode import Role, call, find

MODEL = Role("--model", "the model's", UsageError, ModelError)


def build(target: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the module that ``target`` names: an instance, or what a class or factory returns for ``arguments``.

    Raises UsageError where the target does not exist or does not take the arguments, ModelError where its code raised.
    """
    value = find(target, MODEL)
    if not isinstance(value, nn.Module):
        if not callable(value):
            raise UsageError(
                f"--model {target} is a {type(value).__name__}, neither a module nor callable", MODEL.forms
            )
        value = call(value, target, MODEL, arguments)
    elif arguments:
        raise UsageError(f"--model {target} is a finished module, which takes no arguments", "leave --model-arg out")
    if not isinstance(value, nn.Module):
        raise UsageError(f"--model {target} gives a {type(value).__name__}, not a torch.nn.Module", MODEL.forms)
    return value
