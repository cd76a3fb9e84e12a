"""Small sound files of every kind, from which the fuzzer starts."""

from __future__ import annotations

import functools
import io
import json
import pickle
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from tests.hostile import mutate

Files = dict[str, bytes]  # name in the folder -> content
Mutator = Callable[..., bytes]


def saved(value: Any, **options: Any) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes]) -> bytes:
    """Return a zip archive of uncompressed entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def networks() -> list[nn.Module]:
    """Return small modules of most of torch's layer classes."""
    torch.manual_seed(0)
    image = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1)]
    return [
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softmax(dim=1)),
        nn.Sequential(*image, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, stride=2), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2), nn.GELU()),
        nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.LeakyReLU(), nn.ConstantPad2d(1, 0.0), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReflectionPad1d(1), nn.LPPool1d(2, 2), nn.InstanceNorm1d(4), nn.Hardswish()),
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2), nn.ReplicationPad3d(1), nn.Softplus(), nn.AdaptiveMaxPool3d(1)),
        nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)), nn.PixelShuffle(1), nn.ChannelShuffle(2), nn.Fold(2, 2)),
        nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.GLU(), nn.LogSoftmax(dim=-1)),
        nn.EmbeddingBag(9, 4, mode="sum"),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=F.gelu),
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
        nn.GRU(3, 4, batch_first=True),
        nn.RNNCell(3, 4),
        nn.Bilinear(3, 4, 5),
        nn.Sequential(nn.Linear(4, 4), nn.LocalResponseNorm(2), nn.PReLU(4), nn.RMSNorm(4), nn.Threshold(0.1, 0.2), nn.ELU()),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding_mode="circular", padding=1), nn.Unfold(2), nn.Softmin(dim=1)),
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ParameterList([nn.Parameter(torch.ones(2))])}),
        nn.AdaptiveLogSoftmaxWithLoss(4, 10, [3, 6], div_value=1.0),
    ]  # fmt: skip


def states() -> list[Any]:
    """Return state_dicts and training checkpoints."""
    state = networks()[1].state_dict()
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    tied = torch.ones(3, 3)
    return [
        state,
        {"model": state, "optimizer": optimizer, "epoch": 7, "args": {"name": "x", "sizes": [1, 2]}},
        OrderedDict({f"module.{name}": tensor.half() for name, tensor in state.items()}),
        {"a": tied, "b": tied.t(), "c": torch.zeros(2, 0),
         "d": torch.ones(4, dtype=torch.bfloat16)[1:3], "e": nn.Parameter(tied)},
    ]  # fmt: skip


def configurations() -> list[dict[str, Any]]:
    """Return small configurations of transformers' models."""
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
    }
    few = {**text, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    patches = {**text, "image_size": 16, "patch_size": 8}
    return [
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "max_position_embeddings": 16, **text},
        {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 20},
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "rope_theta": 1e4, **few},
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "id2label": {"0": "a", "1": "b"}, **patches},
        {"model_type": "clip", "projection_dim": 8, "text_config": {**text, "max_position_embeddings": 8},
         "vision_config": patches},
        {"model_type": "resnet", "architectures": ["ResNetModel"], "hidden_sizes": [4, 8], "depths": [1, 1], "embedding_size": 4,
         "layer_type": "basic", "num_channels": 3},
    ]  # fmt: skip


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Return arrays of several types."""
    return {
        "x": np.ones((8, 4), np.float32),
        "ids": np.arange(8),
        "b": np.ones((2, 0)),
        "f": np.asfortranarray(np.ones((3, 2))),
    }


def _safetensors() -> list[Files]:
    return [
        {"m.safetensors": safetensors.torch.save(networks()[1].state_dict(), metadata)}
        for metadata in (None, {"format": "pt", "note": "x"})
    ]


def _pickles() -> list[Files]:
    value = {"w": [1.5, 2**70, "x", b"y", None, True, (1, 2, 3), {4}], "f": functools.partial}
    return [{"m.pkl": pickle.dumps(value, protocol)} for protocol in range(6)]


def _programs() -> list[Files]:
    entries = {"m/data.pkl": mutate.PLAIN_PICKLE, "m/version": b"3\n"}
    return [
        {"m.pt": zipped({**entries, "m/constants.pkl": b"\x80\x02)."})},
        {"m.pt2": zipped({**entries, "m/archive_format": b"pt2", "m/models/model.json": b"{}"})},
    ]


def _folders() -> list[Files]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**configurations()[0])
    state = AutoModel.from_config(config).state_dict()
    names = sorted(state)
    config_file = json.dumps(config.to_dict()).encode()
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    found = []
    for index, suffix, write in (
        ("model.safetensors.index.json", "safetensors", safetensors.torch.save),
        ("pytorch_model.bin.index.json", "bin", saved),
    ):
        shards = {
            f"model-{part}.{suffix}": write({name: state[name] for name in half}) for part, half in enumerate(halves)
        }
        table = {name: f"model-{part}.{suffix}" for part, half in enumerate(halves) for name in half}
        listed = json.dumps({"metadata": {"total_size": 9}, "weight_map": table}).encode()
        found.append({"config.json": config_file, index: listed, **shards})
    found.append({"config.json": config_file, "model.safetensors": safetensors.torch.save(state)})
    return found


def _distributed() -> list[Files]:
    import torch.distributed.checkpoint as dcp

    found = []
    for state in (networks()[0].state_dict(), {"model": networks()[0].state_dict(), "step": 3, "lr": [0.1]}):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
            found.append({path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())})
    return found


def _npz() -> list[Files]:
    found = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, **arrays())
        found.append({"p.npz": buffer.getvalue()})
    return found


def _npy() -> list[Files]:
    found = []
    for array in arrays().values():
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.append({"p.npy": buffer.getvalue()})
    return found


SEEDS: dict[str, Callable[[], list[Files]]] = {
    "safetensors": _safetensors,
    "state": lambda: [{"m.pt": saved(state)} for state in states()],
    "module": lambda: [{"m.pt": saved(network)} for network in networks()],
    "legacy": lambda: [{"m.pth": saved(state, _use_new_zipfile_serialization=False)} for state in states()],
    "pickle": _pickles,
    "program": _programs,
    "config": lambda: [{"config.json": json.dumps(fields).encode()} for fields in configurations()],
    "folder": _folders,
    "distributed": _distributed,
    "probe-npz": _npz,
    "probe-npy": _npy,
    "probe-safetensors": lambda: [{"p.safetensors": file["m.safetensors"]} for file in _safetensors()],
    "probe-pt": lambda: [
        {"p.pt": saved(value)} for value in (torch.ones(3, 4), [torch.ones(2)], {"x": torch.ones(2, 2)})
    ],
}

MUTATORS: dict[str, Mutator] = {
    ".safetensors": mutate.safetensors,
    ".pt": mutate.archive,
    ".pt2": mutate.archive,
    ".bin": mutate.archive,
    ".distcp": mutate.plain,
    ".pth": mutate.pickled,
    ".pkl": mutate.pickled,
    ".metadata": mutate.pickled,
    ".npy": mutate.npy,
    ".npz": mutate.npz,
    ".json": mutate.json_file,
}
