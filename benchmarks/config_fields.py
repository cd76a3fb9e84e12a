"""What the fields of a configuration mean, by their names, and what becomes of the number in each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

VOCABULARY = 512
POSITIONS = 512
EXPERTS, GROUPS, CHOSEN = 8, 4, 2
LAYERS = 2
WINDOW = 8
_DEVIATION = 0.15  # of a weight: made for wide layers, a default would leave nothing but zeros behind narrow ones
SCALE = 0  # the key under which the factor of an image's side is kept
_LARGEST_GRID = 128  # patches along one axis: counts above are of whole grids
_SMALL = 16  # widths below this are left alone: channels of an image, a kernel, a factor

LAYER_COUNT = re.compile(
    r"(^|_)(num|n)_(\w+_)?(layers?|blocks)$|^(\w+_)?(encoder|decoder|resampler|qformer|entity|postnet)_(layers|depth)$"
    r"|^n_layers?$|^layers$|^depth$|^(\w+_)?depths$|^stage_num_blocks$|^num_block_repeats$"
    r"|^stage_numb_of_layers$"
)
NO_LAYER_COUNT = re.compile(
    r"feat_extract|shared|dense_layers|adapter_layers|per_group|random|intraclass|attn_res|lstm|res_blocks"
)
_HEADS = re.compile(r"heads?$|heads_per_stage$|_heads_")
_HEAD_WIDTH = re.compile(
    r"head_dim|d_kv$|dim_head|d_head|lora_rank|dt_rank|rotary_dim|kv_channels|state_size|d_state|time_step_rank|head_size|mem_dim$"
)
_WIDTH = re.compile(
    r"hidden|latents$|d_ssm$|num_pos_feats|intermediate|dims?($|_)|_size(s)?($|_)|channels|width|embd|ffn|inner|d_model|d_ff|units|filters|feature|planes|conv_dim"
)
_NO_WIDTH = re.compile(
    r"vocab|image|patch_size|patch_dim|patch_embed_hidden|kernel|window|chunk|stride|batch|position|num_(?!pos_feats)|^n_(?!embd|inner|filters)|group|crop|token|max_|min_|block_size|sampl"
    r"|input_feat_size|codebook_size|pool_size|tubelet|length|capacity|act$|layers?$|context_size|roi_size|merge|rate|layer_id"
    r"|scale|ratio|_idx|mult|pad|feat_size|mel|resolution|bins|img|spec_size|feature_layer|indexes|feature_sizes|hidden_act"
)
_VOCABULARY = re.compile(r"vocab_size|_vocab$|num_embeddings$|codebook_size$|char_vocab|n_words$|num_embeds$")
_POSITIONS = re.compile(
    r"max_(2d_)?position_embeddings$|^n_positions$|max_seq_len(gth)?$|n_ctx$|model_max_length$|max_position$"
)
_SOURCES = re.compile(r"max_source_positions$")
_EXPERTS = re.compile(r"(num|n)_(\w+_)?experts$|^num_experts_\w+$")
_NO_EXPERTS = re.compile(r"shared|per_tok|zero")
_CHOSEN = re.compile(
    r"experts_per_tok(en)?$|moe_topk|moe_top_k|^top_k(_experts)?$|moe_k$|num_selected_experts|num_experts_per|^topk$|router_top_k"
)
_GROUPS = re.compile(r"^n_group$|^num_expert_group$|^num_groups_experts$")
_PERIOD = re.compile(r"(period|interval|sparse_step|layer_step|pattern|cross_attention_frequency|attention_every)$")
_WINDOW = re.compile(
    r"^sliding_window(_size)?$|^attention_window$|^local_attention$|^attention_window_size$|^window_length$"
)
_TOKEN = re.compile(r"token_ids?$|token_index$|_token$|^(pad|bos|eos|unk|mask|cls|sep)_index$|token_id_\w+$")
_CHILD = re.compile(r"config")


@dataclass(frozen=True)
class Level:
    """How hard to shrink: divisors of head widths and of head counts, layers kept, patches along an image's side."""

    width: int = 8
    heads: int = 4
    image: bool = True
    layers: int = LAYERS
    patches: int = 4


def has_experts(config: Any) -> bool:
    """Whether a configuration, or one inside it, counts experts."""
    every = [(name, value) for part in tree(config) for name, value in fields(part).items()]
    return any(_EXPERTS.search(name) and not _NO_EXPERTS.search(name) and is_int(value) for name, value in every)


def tree(config: Any) -> Iterator[Any]:
    """Yield a configuration and all configurations inside it, plain dictionaries included."""
    seen: set[int] = set()
    waiting = [config]
    while waiting:
        part = waiting.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for name, value in fields(part).items():
            if hasattr(value, "to_dict") or (isinstance(value, dict) and _CHILD.search(name)):
                waiting.append(value)
            elif isinstance(value, dict) and name in {"backbone_kwargs", "rope_parameters", "rope_scaling"}:
                continue


def fields(part: Any) -> dict[str, Any]:
    """Return the fields of a configuration object or dictionary."""
    if isinstance(part, dict):
        return part
    return {name: value for name, value in vars(part).items() if not name.startswith("_")}


def set_field(part: Any, name: str, value: Any) -> None:
    if isinstance(part, dict):
        part[name] = value
        return
    old = vars(part).get(name)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    try:
        setattr(part, name, value)
    except Exception:
        object.__setattr__(part, name, value)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def map_ints(value: Any, function: Callable[[int], int]) -> Any:
    """Apply ``function`` to an integer or to every integer in nested lists."""
    if is_int(value):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_ints(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_ints(item, function) for key, item in value.items()}
    return value


def shrunk(name: str, value: Any, level: Level, tokens: dict[int, int], grids: dict[int, int]) -> Any:
    if name in {"initializer_range", "init_std", "init_scale"} and isinstance(value, float):
        return max(value, _DEVIATION)
    if value is None or isinstance(value, bool | str | float) or hasattr(value, "to_dict"):
        return value
    if name.startswith("rope_") and isinstance(value, dict):
        return _rope(value, level)
    if isinstance(value, dict):
        return value
    if name == "image_grid_pinpoints":
        return map_ints(value, lambda v: grids.get(-v, v))
    if name in {"image_embedding_size", "memory_attention_rope_feat_sizes"}:
        return map_ints(value, lambda v: grids.get(v, v))
    if name == "backbone_feature_sizes":
        return map_ints(value, lambda v: v // grids.get(SCALE, 1))
    function = _rule(name, level, tokens)
    if function is not None:
        uneven = isinstance(value, list | tuple) and any(v % level.heads for v in _ints(value))
        return value if uneven and _HEADS.search(name) else map_ints(value, function)
    if "groups" in name and is_int(value) and value >= 64:  # one group per channel
        return _part(value, level.width * level.heads, 4)
    if is_int(value) and value > _LARGEST_GRID and value in grids:
        return grids[value]
    return value


def _rule(name: str, level: Level, tokens: dict[int, int]) -> Callable[[int], int] | None:
    """Return what happens to an integer field of this name, None where it stays."""
    if _TOKEN.search(name):
        return lambda v: tokens.get(v, v)
    if _VOCABULARY.search(name):
        return lambda v: min(v, VOCABULARY)
    if _POSITIONS.search(name):
        return lambda v: min(v, POSITIONS) if v > 0 else v
    if _SOURCES.search(name):
        return lambda v: min(v, 64)
    if _CHOSEN.search(name):
        return lambda v: min(v, CHOSEN)
    if _EXPERTS.search(name) and not _NO_EXPERTS.search(name):
        return lambda v: min(v, EXPERTS)
    if _GROUPS.search(name):
        return lambda v: min(v, GROUPS)
    if name == "topk_group":
        return lambda v: min(v, CHOSEN)
    if name in {"index_topk", "index_block_size"}:
        return lambda v: min(v, 4)
    if name in {"num_queries", "num_latents", "latent_query_num"}:
        return lambda v: min(v, 32)
    if name.startswith("vision_feature_layer"):
        return lambda v: max(-2, min(v, 2))
    if name in {"n_window", "n_window_infer"}:
        return lambda v: min(v, 16 if v <= 128 else 64)
    if name == "mm_tokens_per_image":
        return lambda v: min(v, 4)
    if name == "index_topk_blocks":
        return lambda v: min(v, 2)
    if name == "first_k_dense_replace" or name == "num_dense_layers" or name.endswith("_layer_offset"):
        return lambda v: min(v, 1)
    if _PERIOD.search(name):
        return lambda v: min(v, 2)
    if _WINDOW.search(name):
        return lambda v: min(v, WINDOW) if v > 0 else v
    if _HEAD_WIDTH.search(name):
        return lambda v: _part(v, level.width, 2)
    if _HEADS.search(name) and "dim" not in name and "size" not in name and "width" not in name:
        return lambda v: _part(v, level.heads)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name):
        unit = 32 if name == "base_channels" else 4  # groups of a normalization
        return lambda v: _part(v, level.width * level.heads, unit, least=_SMALL)
    return None


def _part(value: int, divisor: int, unit: int = 1, least: int = 1) -> int:
    """Return the value divided by as much of ``divisor`` as leaves a multiple of ``unit`` and at least ``least``."""
    if value < least or value % unit or value <= 0:
        return value
    by = math.gcd(value // unit, divisor)
    while value // by < least:
        by //= 2
    return value // by


def _rope(value: dict[str, Any], level: Level) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            new[key] = _rope(item, level)
        elif key == "mrope_section":
            new[key] = [_part(v, level.width) for v in item]
        elif key in {"short_factor", "long_factor"}:
            new[key] = item[: max(1, len(item) // level.width)]
        else:
            new[key] = item
    return new


def is_int_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(is_int(v) for v in value)


def token_map(config: Any) -> dict[int, int]:
    """Return new ids for the special tokens that the shrunken vocabulary does not hold."""
    found: set[int] = set()
    for part in tree(config):
        for name, value in fields(part).items():
            if _TOKEN.search(name):
                found |= set(_ints(value))
    large = sorted(v for v in found if v >= VOCABULARY)
    taken = {v for v in found if v < VOCABULARY}
    free = (v for v in range(VOCABULARY - 1, 0, -1) if v not in taken)
    return dict(zip(large, free, strict=False))


def _ints(value: Any) -> Iterator[int]:
    if is_int(value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _ints(item)
