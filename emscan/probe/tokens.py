"""The tokenizer of a model's folder: text -> ids, cut to what the model takes. Nothing is downloaded.

`tokenizer.json` is read by the tokenizers library; it is data. Other files (`vocab.txt`, `spiece.model`) go through
transformers, offline; the folder's own code runs only where the user trusts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emscan.errors import ProbeError
from emscan.load.source import brief
from emscan.probe.arguments import settings

_HINT = "give tokens as tensors, or --probe-arg tokenizer=FOLDER"
_OF_TRANSFORMERS = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_LARGEST = 1 << 28  # bytes of a tokenizer.json
_MOST_GROWTH = 64
_NO_LIMIT = 1_000_000  # transformers writes 1e30 where a tokenizer has no length of its own
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Tokenizer:
    """``encode``: lines -> ids, special tokens included; ``pad``: the id that fills up; ``longest``: tokens, if known."""

    encode: Callable[[list[str]], list[list[int]]]
    pad: int
    longest: int | None
    source: str


def find_tokenizer(folder: Path | None, module: nn.Module, trust: bool, longest: int | None) -> Tokenizer:
    """Return the tokenizer in ``folder``, a folder or a tokenizer.json; ``longest``: what the user asks for.

    Raises ProbeError where there is none, or where it cannot be read.
    """
    if folder is None:
        raise ProbeError("a text file needs the model's tokenizer, and the model is no folder with one", _HINT)
    file = folder if folder.is_file() else folder / "tokenizer.json"
    place = file.parent
    extra = settings(place, "tokenizer_config.json")
    limit = longest or _longest(module, extra)
    if file.is_file():
        if file.stat().st_size > _LARGEST:
            raise ProbeError(f"the tokenizer {file} has more than {_LARGEST:,} bytes", _HINT)
        encode, pads = _of_json(file, limit)
    elif any((place / name).is_file() for name in _OF_TRANSFORMERS):
        encode, pads = _of_transformers(place, limit, trust)
    else:
        raise ProbeError(f"{folder} has no tokenizer (no tokenizer.json)", _HINT)
    pad = next((i for i in (*pads(_pad_tokens(place, extra)), *_configured_pads(module)) if i is not None), 0)
    return Tokenizer(encode, pad, limit, str(file if file.is_file() else place))


def _longest(module: nn.Module, extra: dict[str, Any]) -> int | None:
    """Return the most tokens that the model or its tokenizer takes, None where neither says."""
    found = []
    config = getattr(module, "config", None)
    for name in _POSITIONS:
        value = getattr(config, "__dict__", {}).get(name)
        if isinstance(value, int) and value > 0:
            found.append(value - _reserved(module, value))
    value = extra.get("model_max_length")
    if isinstance(value, int | float) and 0 < value < _NO_LIMIT:
        found.append(int(value))
    return min(found) if found else None


def _reserved(module: nn.Module, rows: int) -> int:
    """Return the rows of a position table that no position has: those up to its padding row, as in RoBERTa."""
    tables = [layer for layer in module.modules() if isinstance(layer, nn.Embedding) and layer.num_embeddings == rows]
    return max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)


def _pad_tokens(place: Path, extra: dict[str, Any]) -> list[str]:
    found = [extra.get("pad_token"), settings(place, "special_tokens_map.json").get("pad_token")]
    contents = [item.get("content") if isinstance(item, dict) else item for item in found]
    return [item for item in contents if isinstance(item, str)]


def _configured_pads(module: nn.Module) -> Iterator[int | None]:
    """Yield ids with which transformers fills up where the tokenizer has no token for it."""
    fields = getattr(getattr(module, "config", None), "__dict__", {})
    for name in ("pad_token_id", "eos_token_id"):
        value = fields.get(name)
        value = value[0] if isinstance(value, list) and value else value
        yield value if isinstance(value, int) and value >= 0 else None


Pads = Callable[[list[str]], Iterator[int | None]]


def _of_json(file: Path, limit: int | None) -> tuple[Callable[[list[str]], list[list[int]]], Pads]:
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise ProbeError("a text file needs the tokenizers package", "install emscan[transformers]") from None
    _check_growth(file)
    fast = _guarded(file, lambda: Fast.from_file(str(file)))
    padding = fast.padding
    fast.no_padding()
    fast.no_truncation()
    if limit is not None:
        _guarded(file, lambda: fast.enable_truncation(limit))

    def encode(lines: list[str]) -> list[list[int]]:
        return [found.ids for found in _guarded(file, lambda: fast.encode_batch(lines))]

    def pads(tokens: list[str]) -> Iterator[int | None]:
        yield from (fast.token_to_id(token) for token in tokens)
        yield padding["pad_id"] if padding else None

    return encode, pads


def _check_growth(file: Path) -> None:
    """Refuse a tokenizer whose replacements may blow a line up: chained ones multiply."""
    try:
        waiting: list[Any] = [json.loads(file.read_bytes())["normalizer"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        waiting = []  # what is no tokenizer is refused by the library
    growth = 1
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            added = [part.get("content"), part.get("prepend")]
            growth *= math.prod(max(1, len(item)) for item in added if isinstance(item, str))
        if growth > _MOST_GROWTH:
            raise ProbeError(f"the tokenizer {file} makes text over {_MOST_GROWTH} times longer", _HINT)
        waiting += [*part.values()] if isinstance(part, dict) else part if isinstance(part, list) else []


def _guarded(file: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in the library's Rust is no Exception
        raise ProbeError(f"the tokenizer {file} does not work ({brief(error)})", "save it again") from None


def _of_transformers(
    place: Path, limit: int | None, trust: bool
) -> tuple[Callable[[list[str]], list[list[int]]], Pads]:
    try:
        from transformers import AutoTokenizer

        from emscan.load.huggingface import offline
    except ImportError:
        raise ProbeError(f"the tokenizer in {place} needs transformers", "install emscan[transformers]") from None

    def load() -> Any:
        with offline():
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=trust)

    slow = _guarded(place, load)

    def encode(lines: list[str]) -> list[list[int]]:
        cut = {"truncation": True, "max_length": limit} if limit is not None else {}
        return [list(ids) for ids in _guarded(place, lambda: slow(lines, **cut)["input_ids"])]

    return encode, lambda _: iter([slow.pad_token_id])
