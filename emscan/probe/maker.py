"""What the makers of inputs look at: the configuration and those inside it, the plan, and random values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 16  # tokens of a text, steps of a trajectory
_TOKEN_FIELDS = ("token_id", "token_ids", "token_index", "_token")

Values = dict[str, Any]


class NoVariantError(Exception):
    """There are fewer shapes to try than asked for."""


@dataclass
class Maker:
    """What the makers look at. ``tokens``: placeholders per sample that stand for the rows of an image or of audio."""

    module: nn.Module
    names: set[str]
    required: set[str]
    groups: tuple[str, ...]
    distribution: str = "normal"
    variant: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 2
    values: Values = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)
    parts: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = list(configurations(self.module.config))

    def make(self, makers: Mapping[str, Callable[[Maker], Tensor | None]], samples: int, seed: int) -> Values:
        """Return values for every parameter that the plan fills, the same for the same seed."""
        self.samples, self.values = samples, {}
        self.generator = torch.Generator().manual_seed(seed)
        for name, make in makers.items():
            if name in self.names:
                made = make(self)
                if made is not None:
                    self.values[name] = made
        return self.values

    def look(self, *names: str, kind: str = "", default: Any = None) -> Any:
        """Return the first field of one of these names: in sub-configurations of ``kind``, the root, then anywhere."""
        ordered = [part for path, part in self.parts if kind and kind in path]
        ordered += [part for path, part in self.parts if not path]
        ordered += [part for path, part in self.parts if path]
        for part in ordered:
            for name in names:
                value = _field(part, name)
                if value is not None:
                    return value
        return default

    def whole(self, *names: str, kind: str = "", default: int) -> int:
        """Return an integer field, of a list its last entry."""
        found = self.look(*names, kind=kind, default=default)
        found = found[-1] if isinstance(found, list | tuple) and found else found
        return found if isinstance(found, int) else default

    def token(self, kind: str) -> int | None:
        """Return the id of the placeholder of an image, a video or audio."""
        found = self.look(f"{kind}_token_id", f"{kind}_token_index", f"{kind}_pad_token_id", f"{kind}_patch_token_id")
        return found if isinstance(found, int) else None

    def mark(self, kind: str, where: str) -> int | None:
        """Return the id that opens (``start``) or closes (``end``) an image, a video or audio, if there is one."""
        names = [f"{kind}_{where}_token_id", *([] if kind == "audio" else [f"vision_{where}_token_id"])]
        found = self.look(*names)
        return found if isinstance(found, int) else None

    def floats(self, *shape: int) -> Tensor:
        """Return random values."""
        draw = torch.rand if self.distribution == "uniform" else torch.randn
        return draw(shape, generator=self.generator)

    def below(self, high: int, *shape: int) -> Tensor:
        """Return integers below ``high`` to which the configuration gives no meaning of their own."""
        special = sorted({i for i in _special_ids(self.parts) if 0 <= i < high})
        if len(special) >= high:
            return torch.zeros(shape, dtype=torch.int64)
        ids = torch.randint(high - len(special), shape, generator=self.generator)
        for taken in special:  # in order: each moves up all that are not below it
            ids += ids >= taken
        return ids

    def pick(self, group: str, shapes: list[tuple[int, ...]], skipped: int = 0) -> Tensor:
        """Return random values in the shape that the plan asks for; ``skipped``: variants that are no shape of these."""
        shapes = list(dict.fromkeys(shapes))
        index = self.variant.get(group, 0) - skipped
        if index >= len(shapes):
            raise NoVariantError
        return self.floats(*shapes[index])


def configurations(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield a configuration and those inside it, each with the path of fields that leads there."""
    seen: set[int] = set()
    waiting = [("", config)]
    while waiting:
        path, part = waiting.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield path, part
        for name, value in vars(part).items():
            if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
                waiting.append((f"{path}.{name}", value))


def _field(part: Any, name: str) -> Any:
    try:
        return getattr(part, name, None)
    except Exception:  # a configuration may refuse a field that differs between layers
        return part.__dict__.get(name)


def _special_ids(parts: list[tuple[str, Any]]) -> Iterator[int]:
    for _, part in parts:
        for name, value in vars(part).items():
            if name.endswith(_TOKEN_FIELDS):
                yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))
