"""What is done to an image before a model sees it: as the model's folder says, and as options say instead.

Read are `preprocessor_config.json` and `processor_config.json` of transformers, and the `pretrained_cfg` of timm in
`config.json`. Nothing in them names code that is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emscan.errors import ProbeError
from emscan.load.source import printable
from emscan.probe.arguments import LONGEST_SIDE, Arguments, settings

KNOWN = ("size", "resize", "interpolation", "channels", "rescale", "mean", "std")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in Pillow's numbering
_MODES = {1: "gray", 3: "RGB", 4: "RGBA"}
_NAME = re.compile(r"[A-Za-z_]\w{0,100}ImageProcessor(Fast|Pil)?|[A-Za-z_]\w{0,100}FeatureExtractor")
_FIELDS = (
    "size", "crop_size", "crop_pct", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "resample",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Steps in order: convert to ``channels``, resize, crop at the center, multiply by ``scale``, normalize.

    ``edges``: (height, width) to resize to; ``short``: the shorter edge, and ``most`` for the longer one. ``crop``:
    (height, width). ``scale`` applies to values from 0 to 255. ``rounded``: the crop starts at the rounded middle, as
    torchvision does it, not at the floor of it, as transformers does. ``origin``: who says so.
    """

    channels: int | None = None
    edges: tuple[int, int] | None = None
    short: int | None = None
    most: int | None = None
    crop: tuple[int, int] | None = None
    filter: str = "bilinear"
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rounded: bool = False
    origin: str = ""

    @property
    def final(self) -> tuple[int, int] | None:
        """Height and width that every image has in the end, None where images may differ."""
        return self.crop or self.edges

    def describe(self, shape: tuple[int, int] | None) -> str:
        """Return the steps in words; ``shape``: height and width that the images turn out to have."""
        height, width = shape or (0, 0)
        parts = [_MODES[self.channels or 3] + (f" {height}x{width}" if shape else " of their own sizes")]
        if self.edges is not None:
            parts.append(f"resized to {self.edges[0]}x{self.edges[1]} ({self.filter})")
        elif self.short is not None:
            longest = f", longer at most {self.most}" if self.most is not None else ""
            parts.append(f"shorter edge resized to {self.short}{longest} ({self.filter})")
        if self.crop is not None:
            parts.append(f"center crop {self.crop[0]}x{self.crop[1]}")
        parts.append("values 0 to 255" if self.scale is None else _scaled(self.scale))
        if self.mean is not None or self.std is not None:
            parts.append(f"mean {_listed(self.mean or (0.0,))} std {_listed(self.std or (1.0,))}")
        else:
            parts.append("not normalized")
        return ", ".join(parts) + (f" (from {self.origin})" if self.origin else "")


def _scaled(scale: float) -> str:
    return "values 0 to 1" if math.isclose(scale, 1 / 255, rel_tol=1e-6) else f"values times {scale:g}"


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def recipe(folder: Path | None, arguments: Arguments) -> Recipe:
    """Return the recipe of a model's folder (None: there is none), with what options say instead.

    Raises ProbeError for a configuration that makes no sense, UsageError for such an option.
    """
    found = _of_folder(folder)
    changed: dict[str, Any] = {}
    size, resize = arguments.sides("size"), arguments.sides("resize")
    if size is not None:
        changed |= {"crop": (size[0], size[-1]), "edges": None, "short": min(size), "most": None}
        if len(size) == 2 and size[0] != size[1]:
            changed |= {"edges": size, "crop": None, "short": None}  # a crop would need to know how tall images are
        elif found.crop is not None and found.short is not None:  # the same margin as before
            changed["short"] = max(size[0], size[0] * found.short // max(1, min(found.crop)))
        elif found.edges is not None:
            changed |= {"edges": (size[0], size[-1]), "crop": None, "short": None}
    if resize is not None:
        exact = (resize[0], resize[1]) if len(resize) == 2 else None
        changed |= {"edges": exact, "short": None if exact else resize[0], "most": None}
        changed["crop"] = (size[0], size[-1]) if size is not None else found.crop
    changed |= _values(arguments)
    if not changed:
        return found
    said = f"{found.origin} and --probe-arg" if found.origin else "--probe-arg"
    made = replace(found, **changed, origin=said)
    _check_channels(made)
    return made


def _values(arguments: Arguments) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    kind = arguments.choice("interpolation", FILTERS)
    if kind is not None:
        changed["filter"] = kind
    channels = arguments.choice("channels", ("1", "3", "4"))
    if channels is not None:
        changed["channels"] = int(channels)
    if "rescale" in arguments:
        changed["scale"] = _factor(arguments)
    for name in ("mean", "std"):
        values = arguments.numbers(name, positive=name == "std")
        if values is not None:
            changed[name] = values
    return changed


def _factor(arguments: Arguments) -> float | None:
    text = str(arguments.text("rescale")).strip().lower()
    if text in ("true", "1/255"):
        return 1 / 255
    if text in ("false", "none"):
        return None
    numbers = arguments.numbers("rescale", positive=True)
    if numbers is None or len(numbers) != 1:
        raise arguments.wrong("rescale", "give a factor such as 0.00392157, or false to keep 0 to 255")
    return None if numbers[0] == 1 else numbers[0]


def _check_channels(made: Recipe) -> None:
    for name in ("mean", "std"):
        values = getattr(made, name)
        if values is not None and made.channels is not None and len(values) not in (1, made.channels):
            raise ProbeError(
                f"{len(values)} values of {name} for images of {made.channels} channel{'s' * (made.channels > 1)}",
                f"give --probe-arg {name}=... with one per channel, or one for all",
            )


def fit_channels(made: Recipe, channels: int) -> Recipe:
    """Return the recipe for a model that takes ``channels`` channels; raises ProbeError where its values do not go
    with them."""
    fitted = replace(made, channels=channels)
    _check_channels(fitted)
    return fitted


# -- the model's folder -----------------------------------------------------------------------------------------------


def _of_folder(folder: Path | None) -> Recipe:
    for name in ("preprocessor_config.json", "processor_config.json"):
        fields = settings(folder, name)
        inner = fields.get("image_processor")
        fields = inner if isinstance(inner, dict) else fields
        if any(field in fields for field in (*_FIELDS, "image_processor_type")):
            return _Reader(f"{folder}/{name}", {**_defaults(fields), **fields}).transformers()
    timm = settings(folder, "config.json").get("pretrained_cfg")
    if isinstance(timm, dict) and "input_size" in timm:
        return _Reader(f"{folder}/config.json", timm).timm()
    return Recipe()


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the named class of the installed transformers takes where the file says nothing."""
    name = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if (
        not isinstance(name, str)
        or not _NAME.fullmatch(name)
        or all(field in fields for field in _FIELDS[:1] + _FIELDS[8:])
    ):
        return {}
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    try:
        import transformers

        kind = getattr(transformers, f"{name}Pil", None)  # the class with torchvision's operators needs torchvision
    except Exception:  # not installed, or some part of it does not import: the file's own fields stand
        return {}
    if not isinstance(kind, type) or not kind.__module__.startswith("transformers."):
        return {}
    found = {field: getattr(kind, field, None) for field in _FIELDS}
    return {field: value for field, value in found.items() if value is not None}


class _Reader:
    """The fields of a configuration, each checked when it is read."""

    def __init__(self, path: str, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def transformers(self) -> Recipe:
        """Return what an image processor with these fields does."""
        sizes = self._resizing()
        crop = self._pair("crop_size") if self._flag("do_center_crop", "crop_size" in self.fields) else None
        sizes.setdefault("crop", crop)
        normalized = self._flag("do_normalize", "image_mean" in self.fields)
        return Recipe(
            **sizes,
            filter=self._filter("resample", 2),
            scale=self._scale() if self._flag("do_rescale", True) else None,
            mean=self._numbers("image_mean") if normalized else None,
            std=self._numbers("image_std", positive=True) if normalized else None,
            origin=Path(self.path).name,
        )

    def _resizing(self) -> dict[str, Any]:
        if not self._flag("do_resize", "size" in self.fields) or self.fields.get("size") is None:
            return {}
        size = self.fields["size"]
        if not isinstance(size, dict):
            edges = self._pair("size")
            # One number used to mean the shorter edge for processors that crop, a square for the others.
            cropped = self._flag("do_center_crop", "crop_size" in self.fields) and isinstance(size, int)
            return {"short": edges[0]} if cropped else {"edges": edges}
        if size.get("height") and size.get("width"):
            return {"edges": (self._side(size["height"]), self._side(size["width"]))}
        if size.get("shortest_edge"):
            short = self._side(size["shortest_edge"])
            share = self.fields.get("crop_pct")
            if isinstance(share, int | float) and 0 < share <= 1:  # ConvNeXt's way
                return (
                    {"short": int(short / share), "crop": (short, short)} if short < 384 else {"edges": (short, short)}
                )
            return {"short": short, "most": self._side(size["longest_edge"]) if size.get("longest_edge") else None}
        raise self._wrong("size", size)

    def timm(self) -> Recipe:
        """Return what timm's evaluation transform does: Resize and CenterCrop of torchvision."""
        size = self.fields["input_size"]
        if not isinstance(size, list | tuple) or len(size) != 3 or size[0] not in _MODES:
            raise self._wrong("input_size", size)
        height, width = self._side(size[1]), self._side(size[2])
        share = self.fields.get("crop_pct") or 0.875
        if not isinstance(share, int | float) or not 0.05 <= share <= 2:
            raise self._wrong("crop_pct", share)
        larger = (math.floor(height / share), math.floor(width / share))
        squashed = self.fields.get("crop_mode") == "squash" or height != width
        return Recipe(
            channels=size[0],
            edges=larger if squashed else None,
            short=None if squashed else larger[0],
            crop=(height, width),
            filter=self._filter("interpolation", "bilinear"),
            mean=self._numbers("mean"),
            std=self._numbers("std", positive=True),
            rounded=True,
            origin="pretrained_cfg in config.json",
        )

    def _filter(self, name: str, default: Any) -> str:
        value = self.fields.get(name)
        value = default if value in (None, "random") else value  # timm's "random" is for training
        if isinstance(value, str) and value in FILTERS:
            return value
        if isinstance(value, int) and 0 <= value < len(FILTERS):
            return FILTERS[value]
        raise self._wrong(name, value)

    def _flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        return default if value is None else bool(value)

    def _scale(self) -> float | None:
        value = self.fields.get("rescale_factor", 1 / 255)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._wrong("rescale_factor", value)
        return float(value)

    def _numbers(self, name: str, *, positive: bool = False) -> tuple[float, ...] | None:
        value = self.fields.get(name)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        if len(values) not in (1, 3, 4) or not all(
            isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not positive) for x in values
        ):
            raise self._wrong(name, value)
        return tuple(float(x) for x in values)

    def _pair(self, name: str) -> tuple[int, int]:
        value = self.fields.get(name)
        if isinstance(value, dict):
            value = [value.get("height"), value.get("width")]
        if isinstance(value, list | tuple) and len(value) == 2:
            return self._side(value[0]), self._side(value[1])
        return self._side(value), self._side(value)

    def _side(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LONGEST_SIDE // 4:
            raise self._wrong("size", value)
        return int(value)

    def _wrong(self, name: str, value: Any) -> ProbeError:
        return ProbeError(
            f"{self.path} has {name} = {printable(value, 60)}, which is no setting for images",
            "correct it, or move it away and use --probe-arg",
        )
