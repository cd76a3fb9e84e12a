"""Files for the inspection tests, written on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load.conftest import _one_thread, network, packed, saved, written  # noqa: F401 - fixtures


def header_of(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., str]:
    """Write a safetensors file from a header as text and a number of zero bytes."""

    def write(header: str | bytes, size: int = 0, name: str = "w.safetensors") -> str:
        text = header.encode() if isinstance(header, str) else header
        path = tmp_path / name
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        return str(path)

    return write


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of sparse shards: ``count`` of ``gigabytes`` each, with an index and a config.json."""

    def make(count: int, gigabytes: float, layers: int = 8) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        table = {}
        rows = int(gigabytes * 1_000_000_000) // (2 * layers * 1000)
        for shard in range(count):
            name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
            entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
            for layer in range(layers):
                tensor = f"model.layers.{shard * layers + layer}.mlp.weight"
                size = rows * 1000 * 2
                entries[tensor] = entry("BF16", [rows, 1000], layer * size, (layer + 1) * size)
                table[tensor] = name
            header = header_of(entries)
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(len(header) + layers * rows * 1000 * 2)
        index = {"metadata": {"total_size": 0}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
        return folder

    return make
