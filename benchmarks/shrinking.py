"""Shrink a default configuration of any architecture by what its fields mean, sub-configurations included.

Every width is divided by one number and every count of heads by another, over the whole tree, so that sums, products
and equalities between fields survive. What a field means is read off its name; no model is named here.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from config_fields import (
    CHOSEN,
    EXPERTS,
    LAYER_COUNT,
    NO_LAYER_COUNT,
    SCALE,
    VOCABULARY,
    Level,
    fields,
    is_int,
    is_int_list,
    map_ints,
    set_field,
    shrunk,
    token_map,
    tree,
)

LEVELS = (
    Level(8, 4), Level(8, 2), Level(2, 8), Level(8, 4, patches=16), Level(4, 2), Level(1, 8), Level(8, 1), Level(4, 1),
    Level(4, 1, image=False),
    Level(1, 4), Level(2, 1), Level(1, 1), Level(8, 4, layers=6), Level(8, 1, layers=6, image=False),
    Level(1, 1, image=False), Level(1, 1, image=False, layers=1000),
)  # fmt: skip


def shrink(config: Any, level: Level) -> Any:
    """Shrink ``config`` in place and return it."""
    tokens = token_map(config)
    overrides = {id(part): _take_overrides(part) for part in tree(config)}
    grids: dict[int, int] = {}
    for part in tree(config):
        grids |= _shrink_image(part, level)
    for part in tree(config):
        kept = _shrink_layers(part, level)
        _put_overrides(overrides.get(id(part)) or {}, kept, level)
        if _is_scaled(part):
            continue
        for name, value in list(fields(part).items()):
            new = shrunk(name, value, level, tokens, grids)
            if new is not value and new != value:
                set_field(part, name, new)
        _fill(part)
        _fit_groups(part)
    _link(config)
    for part in tree(config):
        own = overrides.get(id(part))
        if own:
            part.per_layer_config = own
    return config


def _shrink_layers(part: Any, level: Level) -> list[int]:
    """Cut the layers of one configuration, with every list that has one entry per layer; return those that stay."""
    have = fields(part)
    named = {n: v for n, v in have.items() if LAYER_COUNT.search(n) and not NO_LAYER_COUNT.search(n)}
    stages = {len(value) for value in named.values() if is_int_list(value)}  # they stay, with fewer layers in each
    counts = {n: v for n, v in named.items() if is_int_list(v) or (is_int(v) and v not in stages)}
    main = next((counts[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
                 if is_int(counts.get(n))), None)  # fmt: skip
    backbone = not isinstance(part, dict) and main and len(vars(part).get("stage_names") or ()) == main + 1
    least = max(level.layers, len(vars(part).get("_out_indices") or ())) if backbone else level.layers
    kept = _kept_layers(have, main, least) if main else []
    for name, value in counts.items():
        if is_int(value):
            set_field(part, name, len(kept) if main and value == main else min(value, level.layers))
        else:
            set_field(part, name, type(value)(min(v, level.layers) for v in value))
    if not main:
        return []
    for name, value in list(have.items()):
        if isinstance(value, list | tuple) and len(value) == main and name not in counts:
            set_field(part, name, type(value)(value[i] for i in kept))
        elif is_int_list(value) and re.search(r"indexes|indices|_idxs?$|layer_ids|_layers$|_indexes$", name):
            set_field(part, name, type(value)(_renumbered(value, kept, main)))
        elif name == "layer_pattern" or (isinstance(value, str) and len(value) == main and "pattern" in name):
            set_field(part, name, "".join(value[i] for i in kept))
        elif name in {"vision_feature_layer", "feature_layer"} and value is not None:
            set_field(part, name, map_ints(value, lambda v: max(-len(kept), min(v, len(kept)))))
        elif name == "num_kv_shared_layers" and is_int(value):
            set_field(part, name, 0)
    if backbone:
        _shrink_backbone(part, kept)
    return kept


def _shrink_backbone(part: Any, kept: list[int]) -> None:
    """Let a backbone whose stages are its layers hand out its last layers, as many as before."""
    have = vars(part) if not isinstance(part, dict) else {}
    wanted = have.get("_out_indices")
    if not wanted or not isinstance(have.get("stage_names"), list) or len(have["stage_names"]) < len(kept) + 1:
        return
    names = have["stage_names"][: len(kept) + 1]
    wanted = list(range(max(1, len(names) - len(wanted)), len(names)))
    part.__dict__.update(stage_names=names, _out_indices=wanted, _out_features=[names[i] for i in wanted])


def _kept_layers(have: dict[str, Any], count: int, least: int) -> list[int]:
    """Return which layers stay: the first of every kind, at least two."""
    lists = [v for v in have.values() if isinstance(v, list | tuple) and len(v) == count]
    lists = [v for v in lists if isinstance(v[0], str | int) and len(set(map(str, v))) <= 4]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * count
    each = 2 if least >= 6 else 1  # layers that share weights need a second one of their kind
    kept = sorted(i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < each)[: max(least, 4)]
    for index in range(count):
        if len(kept) >= min(count, least):
            break
        if index not in kept:
            kept.append(index)
    return sorted(kept)


def _renumbered(value: Any, kept: list[int], count: int) -> list[int]:
    found = [kept.index(v % count if v < 0 else v) for v in value if (v % count if v < 0 else v) in kept and v < count]
    if found or not value:
        return found
    return sorted({min(v, len(kept) - 1) for v in value})[: len(value)]


def _take_overrides(part: Any) -> dict[int, dict[str, Any]]:
    """Take from a configuration what differs between its layers, so that its fields can be read and set."""
    spec = part.__dict__.pop("_heterogeneity_spec", None) if not isinstance(part, dict) else None
    return copy.deepcopy(spec.per_layer_overrides) if spec is not None else {}


def _put_overrides(overrides: dict[int, dict[str, Any]], kept: list[int], level: Level) -> None:
    """Shrink what differs between layers, under the new numbers of the layers that stay."""
    old = dict(overrides)
    overrides.clear()
    for new, index in enumerate(kept):
        fields_of_layer = old.get(index, {})
        overrides[new] = {name: shrunk(name, value, level, {}, {}) for name, value in fields_of_layer.items()}


def _fill(part: Any) -> None:
    """Give fields that a default configuration leaves open the values that the others imply."""
    have = fields(part)
    heads = have.get("num_attention_heads")
    width = have.get("hidden_size")
    implied = {
        "head_dim": width // heads if is_int(width) and is_int(heads) and heads else None,
        "num_key_value_heads": heads,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": CHOSEN,
        "prediction_length": 8,
        "context_length": 16,
        "image_token_id": VOCABULARY - 50,
        "video_token_id": VOCABULARY - 51,
        "audio_token_id": VOCABULARY - 52,
        "audio_token_index": VOCABULARY - 52,
        "image_token_index": VOCABULARY - 50,
        "vocab_size": VOCABULARY,
    }
    for name, value in implied.items():
        if name in have and have[name] is None and value is not None:
            set_field(part, name, value)
    handed_out = have.get("intermediate_layers_indices")
    if is_int_list(handed_out) and is_int(have.get("vision_output_dim")):
        set_field(part, "vision_output_dim", width * (1 + len(handed_out)))
    count = have.get("num_hidden_layers")
    if is_int(count) and have.get("layer_types", ...) is None:
        set_field(part, "layer_types", ["full_attention"] * count)
    if is_int(count) and have.get("attn_layer_indices", ...) is None:
        set_field(part, "attn_layer_indices", [count - 1])
    kinds = have.get("layer_types")
    if kinds and set(kinds) == {"linear_attention"}:
        set_field(part, "layer_types", [*kinds[:-1], "full_attention"])


def _link(config: Any) -> None:
    """Make what one part hands to another as wide as the other takes it, and rotary sections as long as heads."""
    text = fields(config).get("text_config")
    width = fields(text).get("hidden_size") if text is not None else None
    for part in tree(config):
        have = fields(part)
        if is_int(width) and part is not text and is_int(have.get("out_hidden_size")):
            set_field(part, "out_hidden_size", width)
        if is_int(width) and is_int(have.get("output_dim")) and "n_window" in have:
            set_field(part, "output_dim", width)
        _section_rope(part)


def _section_rope(part: Any) -> None:
    """Give rotary embeddings with several position axes sections as long as the heads; other models ignore them."""
    have = fields(part)
    rope, heads = have.get("rope_parameters"), have.get("num_attention_heads")
    width, of_head = have.get("hidden_size"), have.get("head_dim")
    if not isinstance(rope, dict) or "rope_theta" not in rope or not is_int(heads) or not is_int(width):
        return
    width = of_head if is_int(of_head) else width // heads
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    if half >= 3 and sum(rope.get("mrope_section") or [0]) != half:
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _is_scaled(part: Any) -> bool:
    """Shrink a family whose own factor scales every width of a list; returns whether this is one."""
    have = fields(part)
    if not isinstance(have.get("width_coefficient"), float) or not is_int(have.get("hidden_dim")):
        return False
    set_field(part, "hidden_dim", int(have["hidden_dim"] / have["width_coefficient"] * 0.25))
    set_field(part, "width_coefficient", 0.25)
    set_field(part, "depth_coefficient", 0.3)
    if is_int(have.get("image_size")):
        set_field(part, "image_size", 64)
    return True


def _fit_groups(part: Any) -> None:
    """Keep grouped routers possible: the groups divide the experts, and the chosen groups hold the chosen experts."""
    have = fields(part)
    groups = next((have[n] for n in ("n_group", "num_expert_group") if is_int(have.get(n))), None)
    if groups and is_int(have.get("topk_group")) and have["topk_group"] > groups:
        set_field(part, "topk_group", groups)


def _shrink_image(part: Any, level: Level) -> dict[int, int]:
    """Shrink the image of one configuration; return how counts that derive from its patch grid change."""
    have = fields(part)
    size = have.get("image_size")
    if not level.image or size is None:
        return {}
    patch = have.get("patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    if isinstance(patch, dict) or not patch:
        patch = None
    side = level.patches * (patch if patch and patch >= 8 else 16)
    flat = size[-1] if isinstance(size, list | tuple) and size else size
    if not is_int(flat) or flat <= side:
        return {}
    set_field(part, "image_size", map_ints(size, lambda v: side if v > 3 else v))
    crops = {-flat * times: side * times for times in range(1, 17)}  # sizes that tiles of such images make up
    scale = {SCALE: flat // side}
    if not patch:
        return crops | scale
    old, new = flat // patch, side // patch
    return {**crops, **scale, old: new, old * old: new * new, old * old + 1: new * new + 1}
