"""A folder of images as a probe: found recursively, sorted by name, decoded batch by batch.

Folders directly below are class names, as in torchvision's ImageFolder, where the model has as many classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.load.source import printable
from emscan.probe.arguments import Arguments
from emscan.probe.batch import INPUT_BUDGET, MOST_SAMPLES, Batch, Placing, Probe, count_batches, fixed_step
from emscan.probe.image_shape import Settled, image_batch, settled
from emscan.probe.pictures import ENDINGS, PictureError, contents, pixels, require_pillow, size_of
from emscan.probe.recipe import KNOWN, Recipe, recipe
from emscan.probe.signature import Signature, signature
from emscan.report.document import ProbeInfo

_HINT = "remove it from the folder, or save it again"


@dataclass(frozen=True)
class Folder:
    """Image files below ``root`` by relative name, sorted; ``classes``: the folders directly below that hold them."""

    root: Path
    names: list[str]
    classes: list[str]

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"the probe {self.root}"

    def failed(self, name: str, error: PictureError) -> ProbeError:
        """Return the error for one of the images."""
        return ProbeError(f"cannot read {self.where}: {printable(name)} {error}", _HINT)


def open_images(
    spec: str, module: nn.Module, placing: Placing, size: int | None, seed: int,
    arguments: Mapping[str, str] | None, folder: Path | None,
) -> Probe:  # fmt: skip
    """Return the probe over the images in a folder, or over a single image; ``folder``: where the model lies.

    Raises ProbeError where there are none, one is broken, or their size cannot be told; UsageError for options.
    """
    options = Arguments(arguments, KNOWN, "a folder of images")
    require_pillow()
    found = find_images(Path(spec))
    said = recipe(folder, options)
    fit = settled(module, said, lambda: _common_size(found), seed)
    targets, as_classes = _targets(found, fit.classes, module)
    shape = fit.recipe.final or fit.native
    count = f"{len(found.names):,} image{'s' * (len(found.names) != 1)}"
    info = ProbeInfo(f"{spec}: {count}, {fit.recipe.describe(shape)}{as_classes}", seed=seed)
    step = _step(found, fit, module, size)
    passes = _Passes(found, fit.recipe, signature(module), module, placing, targets, step, info)
    return Probe(info, passes, count_batches(len(found.names), step))


def find_images(path: Path) -> Folder:
    """Return the images in a folder and below it; links are followed, each folder once."""
    if not path.is_dir():
        return Folder(path.parent, [path.name], [])
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for place, inner, files in os.walk(path, followlinks=True):
        status = os.stat(place)  # noqa: PTH116 - a name of any bytes
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in ENDINGS and (Path(place) / name).is_file():
                names.append((Path(place) / name).relative_to(path).as_posix())
    if not names:
        kinds = ", ".join(sorted(ending.removeprefix(".") for ending in ENDINGS))
        raise ProbeError(f"the probe {path} is a folder without images ({kinds})", "give a folder that holds some")
    names.sort(key=lambda name: name.split("/"))
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    return Folder(path, names, [] if "" in tops else sorted(tops))


def _common_size(found: Folder) -> tuple[int, int] | None:
    """Return height and width where all images have the same, from their headers alone."""
    common: tuple[int, int] | None = None
    for name in found.names:
        try:
            size = size_of(found.root / name)
        except PictureError as error:
            raise found.failed(name, error) from None
        if common is not None and size != common:
            return None
        common = size
    return common


def _targets(found: Folder, classes: int | None, module: nn.Module) -> tuple[list[int] | None, str]:
    """Return the class of every image, where folders are the classes of the output; and words for it."""
    if not found.classes or classes is None or classes < 2:
        return None, ""
    labels = getattr(getattr(module, "config", None), "label2id", None)
    if isinstance(labels, dict) and all(_is_class(labels.get(name), classes) for name in found.classes):
        index = {name: int(labels[name]) for name in found.classes}
        how = "by label2id of the configuration"
    elif len(found.classes) == classes:
        index = {name: number for number, name in enumerate(found.classes)}
        how = "in sorted order"
    else:
        return None, ""
    shown = ", ".join(printable(name, 40) for name in found.classes[:3])
    more = f", ... ({len(found.classes)})" if len(found.classes) > 3 else ""
    return [index[name.partition("/")[0]] for name in found.names], f"; targets: the folders {shown}{more} {how}"


def _is_class(value: Any, classes: int) -> bool:
    return isinstance(value, int) and 0 <= value < classes


def _step(found: Folder, fit: Settled, module: nn.Module, size: int | None) -> int:
    fixed = fixed_step(module, size, len(found.names))
    if fixed is not None or size is not None:
        return int(fixed or size or 1)
    height, width = fit.recipe.final or fit.native or (512, 512)
    return max(1, min(MOST_SAMPLES, INPUT_BUDGET // ((fit.recipe.channels or 3) * height * width)))


@dataclass
class _Passes:
    """One pass over the images at every call; the first complete one gives the digest of names and bytes."""

    found: Folder
    recipe: Recipe
    forward: Signature
    module: nn.Module
    placing: Placing
    targets: list[int] | None
    step: int
    info: ProbeInfo

    def __call__(self) -> Iterator[Batch]:
        digest = hashlib.sha256()
        for start in range(0, len(self.found.names), self.step):
            images = [self._image(name, digest) for name in self.found.names[start : start + self.step]]
            values = self._stacked(images)
            targets = None if self.targets is None else torch.tensor(self.targets[start : start + len(images)])
            batch = image_batch(values, self.forward, self.module, self.found.where)
            yield self.placing.place(Batch(batch.args, batch.kwargs, targets, len(images)))
        self.info.sha256 = digest.hexdigest()

    def _image(self, name: str, digest: Any) -> Tensor:
        try:
            data = contents(self.found.root / name)
            encoded = name.encode("utf-8", "surrogateescape")
            digest.update(b"%d:%s%d:" % (len(encoded), encoded, len(data)))
            digest.update(data)
            return pixels(data, self.recipe)
        except PictureError as error:
            raise self.found.failed(name, error) from None

    def _stacked(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Return images of one size; of several, padded below and right with a mask where the model takes one."""
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) == 1:
            return {"": torch.stack(images)}
        if "pixel_mask" not in [parameter.name for parameter in self.forward.parameters]:
            (height, width), (other_height, other_width) = sorted(sizes)[:2]
            raise ProbeError(
                f"{self.found.where} holds images of different sizes ({height}x{width}, {other_height}x{other_width})",
                "say what the model takes: --probe-arg size=224 or size=HEIGHTxWIDTH",
            )
        height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        values = torch.zeros(len(images), images[0].shape[0], height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.int64)
        for index, image in enumerate(images):
            values[index, :, : image.shape[1], : image.shape[2]] = image
            mask[index, : image.shape[1], : image.shape[2]] = 1
        return {"": values, "pixel_mask": mask}
