"""One image file -> numbers, by Pillow: decoded, converted, resized and cropped as a recipe says.

An image is untrusted input: only the decoders of common formats are used, and an image of more pixels than Pillow
deems safe is refused before it is decoded.
"""

from __future__ import annotations

import importlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emscan.errors import ProbeError
from emscan.load.source import brief, printable
from emscan.probe.recipe import FILTERS, Recipe

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MOST_PIXELS = 89_478_485  # Pillow's own limit; it stands where a user's code has switched Pillow's off
_MOST_BYTES = 1 << 30  # of a file


class PictureError(Exception):
    """Why an image cannot be used."""


def require_pillow() -> None:
    """Raise ProbeError where Pillow is not installed."""
    try:
        importlib.import_module("PIL.Image")
    except ImportError:
        raise ProbeError("a folder of images needs Pillow, which is not installed", "install emscan[images]") from None


def contents(path: Path) -> bytes:
    """Return the bytes of an image file; raises PictureError where it is none that can be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise PictureError(f"cannot be read ({brief(error)})") from None
    if not data:
        raise PictureError("is empty")
    if len(data) > _MOST_BYTES:
        raise PictureError(f"has more than {_MOST_BYTES:,} bytes")
    return data


def size_of(path: Path) -> tuple[int, int]:
    """Return height and width as the image is shown, from its header alone."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception as error:  # Pillow raises half a dozen types on malformed bytes
        raise PictureError(_why(error)) from None
    return (width, height) if turned else (height, width)


def pixels(data: bytes, recipe: Recipe) -> Tensor:
    """Return an image as floats of shape (channels, height, width); raises PictureError for one that is damaged."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > min(Image.MAX_IMAGE_PIXELS or _MOST_PIXELS, _MOST_PIXELS):
                    raise PictureError(f"has {width:,} x {height:,} pixels, more than Pillow deems safe")
                shown: Any = ImageOps.exif_transpose(image)  # of an animation, the first frame
                shown = _converted(shown, _MODES[recipe.channels or 3])
        array = _cropped(np.asarray(_resized(shown, recipe)), recipe)
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(_why(error)) from None
    return _scaled(array, recipe)


def _why(error: Exception) -> str:
    kind = type(error).__name__
    if kind == "DecompressionBombError":
        return "has more pixels than Pillow deems safe"
    if kind == "UnidentifiedImageError":
        return f"is no image that emscan reads ({', '.join(_FORMATS)})"
    return f"is damaged ({printable(error, 120)})" if str(error) else f"is damaged ({kind})"


def _converted(image: Any, mode: str) -> Any:
    """Return the image in ``mode``; 16-bit values are brought to 8 bits, which Pillow's own conversion would clip."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PictureError("holds integers beyond 16 bits")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise PictureError("holds floating-point pixels, whose range is not known")
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Any, recipe: Recipe) -> Any:
    width, height = image.size
    if recipe.edges is not None:
        height, width = recipe.edges
    elif recipe.short is not None:
        height, width = _by_short_edge(height, width, recipe.short, recipe.most)
    if (width, height) == image.size:
        return image
    if width * height > _MOST_PIXELS:
        raise PictureError(f"is {image.size[0]:,} x {image.size[1]:,}, too narrow to resize its shorter edge")
    return image.resize((width, height), resample=FILTERS.index(recipe.filter))


def _by_short_edge(height: int, width: int, short: int, most: int | None) -> tuple[int, int]:
    """Return the size with the aspect kept, the longer edge at most ``most``."""
    low, high = min(height, width), max(height, width)
    exact = float(short)
    if most is not None and high / low * short > most:
        exact = most * low / high
        short = round(exact)
    long = int((exact if most is not None else short) * high / low)
    short, long = max(1, short), max(1, long)
    return (long, short) if height > width else (short, long)


def _cropped(array: np.ndarray[Any, Any], recipe: Recipe) -> np.ndarray[Any, Any]:
    """Return the middle of an image (height, width[, channels]); one that is too small gets a black border."""
    if recipe.crop is None:
        return array
    (height, width), (wanted_height, wanted_width) = array.shape[:2], recipe.crop
    above, left = max(0, wanted_height - height), max(0, wanted_width - width)
    if above or left:
        # The larger half of the border goes above and left, as in transformers.
        edges = [(-(-above // 2), above // 2), (-(-left // 2), left // 2), *[(0, 0)] * (array.ndim - 2)]
        array = np.pad(array, edges)
        height, width = array.shape[:2]
    top, start = height - wanted_height, width - wanted_width
    top, start = (round(top / 2), round(start / 2)) if recipe.rounded else (top // 2, start // 2)
    return array[top : top + wanted_height, start : start + wanted_width]


def _scaled(array: np.ndarray[Any, Any], recipe: Recipe) -> Tensor:
    # A copy: what Pillow hands out cannot be written to.
    values = torch.from_numpy(np.array(array if array.ndim == 3 else array[..., None])).permute(2, 0, 1).float()
    if recipe.scale is not None:
        values = values * recipe.scale
    if recipe.mean is not None:
        values = values - torch.tensor(recipe.mean).view(-1, 1, 1)
    if recipe.std is not None:
        values = values / torch.tensor(recipe.std).view(-1, 1, 1)
    return values.contiguous()
