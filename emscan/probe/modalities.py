"""One input of a model made from its configuration: a value for each parameter name that such models share.

Every maker returns None where the plan leaves its part of the model out. Where a configuration leaves a shape open,
the plan's variant says which of the possible ones to make; asking beyond the last raises `NoVariantError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from emscan.probe.maker import LENGTH, Maker, NoVariantError
from emscan.probe.signals import SIGNALS

SIDE = 64  # of an image, where the configuration gives none
_SIZED = 3  # ways to give images together with their sizes


# -- text -------------------------------------------------------------------------------------------------------


def _ids(maker: Maker) -> Tensor | None:
    if "text" not in maker.groups or "inputs" in maker.values:
        return None
    positions = maker.whole("max_position_embeddings", "n_positions", kind="text", default=LENGTH)
    length = positions if 0 < positions < LENGTH else LENGTH  # none: positions are relative
    ids = maker.below(_vocabulary(maker), maker.samples, length)
    if "image_embeds_position_mask" in maker.names and "image" in maker.groups:
        rows = maker.below(_vocabulary(maker), maker.samples, maker.whole("latent_query_num", default=1))
        ids = torch.cat([ids[:, :2], rows, ids[:, 2:]], 1)
    for kind, count in maker.tokens.items():
        token = maker.token(kind)
        if token is not None and count:
            marks = [maker.mark(kind, "start"), *[token] * count, maker.mark(kind, "end")]
            places = torch.tensor([[mark for mark in marks if mark is not None]]).expand(maker.samples, -1)
            ids = torch.cat([ids[:, :2], places, ids[:, 2:]], 1)
    return ids


def _vocabulary(maker: Maker) -> int:
    found = maker.whole("vocab_size", "n_words", kind="text", default=0)
    return found if found > 0 else 256  # bytes, where characters are hashed


def _ones(maker: Maker) -> Tensor | None:
    ids = maker.values.get("input_ids", maker.values.get("inputs"))
    return None if ids is None else torch.ones_like(ids)


def _token_types(maker: Maker) -> Tensor | None:
    """Return 1 for the placeholders of an image, 2 for a video's, 3 for those of audio, 0 for text."""
    ids = maker.values.get("input_ids")
    if ids is None:
        return None
    types = torch.zeros_like(ids)
    for number, kind in enumerate(("image", "video", "audio"), start=1):
        token = maker.token(kind)
        if token is not None:
            types[ids == token] = number
    return types


def _image_rows(maker: Maker) -> Tensor | None:
    """Return where the rows of an image go among the ids: after the first two."""
    ids = maker.values.get("input_ids")
    if ids is None or "image" not in maker.groups:
        return None
    rows = torch.zeros_like(ids)
    rows[:, 2 : 2 + maker.whole("latent_query_num", default=1)] = 1
    return rows


def _seen_images(maker: Maker) -> Tensor | None:
    ids = maker.values.get("input_ids")
    return None if ids is None or "image" not in maker.groups else torch.ones(*ids.shape, 1, dtype=torch.int64)


def _decoder_ids(maker: Maker) -> Tensor | None:
    if "decoder" not in maker.groups:
        return None
    vocabulary = maker.whole("vocab_size", kind="decoder", default=0) or _vocabulary(maker)
    steps = LENGTH // 2
    books = maker.whole("num_codebooks", "num_channels", kind="decoder", default=1)
    shapes = [(maker.samples, steps), (maker.samples, steps, books), (maker.samples * books, steps)]
    index = maker.variant.get("decoder", 0)
    if index >= len(shapes) or (index and books == 1):
        raise NoVariantError
    return maker.below(vocabulary, *shapes[index])


def _boxes(maker: Maker) -> Tensor | None:
    ids = maker.values.get("input_ids")
    if ids is None:
        return None
    largest = max(1, min(1000, maker.whole("max_2d_position_embeddings", default=1000)) - 1)
    corners = torch.randint(largest, (*ids.shape, 2, 2), generator=maker.generator).sort(2).values
    return corners.flatten(2)


def _question(maker: Maker) -> Tensor:
    return maker.below(maker.whole("vocab_size", kind="qformer", default=256), maker.samples, LENGTH // 2)


# -- images and videos -------------------------------------------------------------------------------------------


def _side(maker: Maker) -> tuple[int, int]:
    size = maker.look("image_size", "input_size", kind="vision", default=SIDE)
    if isinstance(size, dict):
        size = [size.get("height", SIDE), size.get("width", SIDE)]
    if isinstance(size, list | tuple):
        return (int(size[-2]), int(size[-1])) if len(size) > 1 else (int(size[0]), int(size[0]))
    return int(size), int(size)


def _channels(maker: Maker) -> int:
    found = maker.look("num_channels", "in_channels", "in_chans", "n_channels", kind="vision", default=3)
    return found if isinstance(found, int) and found < 16 else 3


def _patch(maker: Maker) -> int:
    return maker.whole("patch_size", kind="vision", default=16)


def _times(maker: Maker) -> int:
    return maker.whole("temporal_patch_size", "patch_temporal", kind="vision", default=1)


def _grid(maker: Maker) -> tuple[int, int]:
    """Return the patches along the two axes of an image: two by two merged ones."""
    names = ("spatial_merge_size", "merge_size", "pooling_kernel_size", "downsample_factor")
    merge = maker.whole(*names, kind="vision", default=2)
    return 2 * merge, 2 * merge


def _pixels(maker: Maker) -> Tensor | None:
    if "image" not in maker.groups:
        return None
    n, channels, patch = maker.samples, _channels(maker), _patch(maker)
    count = math.prod(_grid(maker))
    flat, stacked = channels * patch * patch, channels * _times(maker) * patch * patch
    if maker.names & {"image_grid_thw", "image_grid_hw", "grid_thw"}:
        packed = [(n * count, stacked), (n * count, flat), (n * count, channels, patch, patch), (n, count, stacked)]
        return maker.pick("image", [*packed, (1, n * count, channels, patch, patch)])
    if maker.names & {"spatial_shapes", "pixel_position_ids", "image_position_ids"}:
        return maker.pick("image", [(n, count, flat), (n, count, stacked)])
    side = _side(maker)
    if _tiles(maker):
        return maker.pick("image", [(n, 1, _tiles(maker), channels, *side)])
    frames = maker.whole("num_frames", kind="vision", default=2)
    shapes = [(n, channels, *side), (n, 1, channels, *side), (n, channels, 224, 224), (n, frames, channels, *side)]
    if _sized(maker):
        return maker.floats(*((n, 3, channels, *side), (n, channels, *side), (n, 5, channels, *side))[_variant(maker)])
    skipped = _SIZED if "image_sizes" in maker.names else 0
    return maker.pick("image", [*shapes, (n, channels, 2 * side[0], side[1])], skipped)


def _variant(maker: Maker) -> int:
    return maker.variant.get("image", 0)


def _sized(maker: Maker) -> bool:
    """Whether the images go with their sizes: crops of one image each, then whole images, then without."""
    return "image_sizes" in maker.names and _variant(maker) < _SIZED


def _tiles(maker: Maker) -> int:
    """Return how many tiles an image may have, 0 for models without."""
    return maker.whole("max_num_tiles", kind="vision", default=1) if "aspect_ratio_ids" in maker.names else 0


def _ratio(maker: Maker) -> Tensor | None:
    """Return the number of the shape that the tiles of an image make up: the first."""
    return torch.ones(maker.samples, 1, dtype=torch.int64) if "image" in maker.groups else None


def _ratio_mask(maker: Maker) -> Tensor | None:
    if "image" not in maker.groups:
        return None
    mask = torch.zeros(maker.samples, 1, _tiles(maker), dtype=torch.int64)
    mask[..., 0] = 1
    return mask


def _cross_mask(maker: Maker) -> Tensor | None:
    ids = maker.values.get("input_ids")
    if ids is None or "image" not in maker.groups or not _tiles(maker):
        return None
    return torch.ones(*ids.shape, 1, _tiles(maker), dtype=torch.int64)


def _patches(maker: Maker) -> Tensor | None:
    """Return flattened patches, which the vision towers of some models take beside their grid."""
    return _pixels(maker) if "grid_thw" in maker.names else None


def _grid_thw(maker: Maker) -> Tensor | None:
    return torch.tensor([[1, *_grid(maker)]] * maker.samples) if "image" in maker.groups else None


def _grid_hw(maker: Maker) -> Tensor | None:
    return torch.tensor([[*_grid(maker)]] * maker.samples) if "image" in maker.groups else None


def _merge(maker: Maker) -> Tensor | None:
    return torch.full((maker.samples,), _grid(maker)[0] // 2) if "image" in maker.groups else None


def _image_sizes(maker: Maker) -> Tensor | None:
    return torch.tensor([[*_side(maker)]] * maker.samples) if "image" in maker.groups and _sized(maker) else None


def _patch_mask(maker: Maker) -> Tensor | None:
    if "image" not in maker.groups or "spatial_shapes" not in maker.names:
        return None
    return torch.ones(maker.samples, math.prod(_grid(maker)), dtype=torch.int64)


def _patch_places(maker: Maker) -> Tensor | None:
    if "image" not in maker.groups:
        return None
    rows, columns = _grid(maker)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return places.expand(maker.samples, -1, -1).contiguous()


def _flattened(maker: Maker) -> Tensor | None:
    if "image" not in maker.groups:
        return None
    patch, channels = _patch(maker), _channels(maker)
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    pixels = maker.floats(maker.samples, len(places), channels * patch * patch)
    return torch.cat([places.expand(maker.samples, -1, -1), pixels], 2)


def _regions(width: str) -> Callable[[Maker], Tensor | None]:
    """Return a maker of one vector per region of an image."""

    def make(maker: Maker) -> Tensor | None:
        return None if "image" not in maker.groups else maker.floats(maker.samples, 8, maker.whole(width, default=4))

    return make


def _videos(maker: Maker) -> Tensor | None:
    if "video" not in maker.groups:
        return None
    n, channels, patch = maker.samples, _channels(maker), _patch(maker)
    if "video_grid_thw" in maker.names:
        rows, flat = n * math.prod(_grid(maker)), channels * patch * patch
        return maker.pick("video", [(rows, _times(maker) * flat), (rows, flat)])
    frames = maker.whole("num_frames", "frames_per_clip", "n_frames", kind="vision", default=4)
    return maker.pick("video", [(n, frames, channels, *_side(maker)), (n, channels, frames, *_side(maker))])


def _video_grid(maker: Maker) -> Tensor | None:
    return torch.tensor([[1, *_grid(maker)]] * maker.samples) if "video" in maker.groups else None


# Values that others are derived from come first.
MAKERS: dict[str, Callable[[Maker], Tensor | None]] = {
    "inputs": _ids,
    "input_ids": _ids,
    "attention_mask": _ones,
    "mm_token_type_ids": _token_types,
    "image_embeds_position_mask": _image_rows,
    "image_attention_mask": _seen_images,
    "decoder_input_ids": _decoder_ids,
    "bbox": _boxes,
    "qformer_input_ids": _question,
    "pixel_values": _pixels,
    "pixel_values_images": _pixels,
    "hidden_states": _patches,
    "image_grid_thw": _grid_thw,
    "image_grid_hw": _grid_hw,
    "grid_thw": _grid_thw,
    "merge_sizes": _merge,
    "image_merge_sizes": _merge,
    "image_sizes": _image_sizes,
    "aspect_ratio_ids": _ratio,
    "aspect_ratio_mask": _ratio_mask,
    "cross_attention_mask": _cross_mask,
    "spatial_shapes": _grid_hw,
    "pixel_attention_mask": _patch_mask,
    "pixel_position_ids": _patch_places,
    "image_position_ids": _patch_places,
    "flattened_patches": _flattened,
    "visual_feats": _regions("visual_feat_dim"),
    "visual_pos": _regions("visual_pos_dim"),
    "pixel_values_videos": _videos,
    "video_grid_thw": _video_grid,
    **SIGNALS,
}
# Inputs that bring data of their own, and the part of the model that they feed.
GROUPS = {
    "input_ids": "text",
    "inputs": "text",
    "decoder_input_ids": "decoder",
    "pixel_values": "image",
    "pixel_values_images": "image",
    "flattened_patches": "image",
    "hidden_states": "image",
    "visual_feats": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "audio_mel": "audio",
    "input_values": "audio",
    "past_values": "series",
    "states": "trajectory",
}
VARIANTS = {"image": 8, "audio": 6, "video": 2, "decoder": 3, "series": 2}
