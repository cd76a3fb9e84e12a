"""Names that checkpoints use: for a model, for what stands beside it, for their own records. No torch here."""

from __future__ import annotations

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net_state_dict", "network_state_dict")
SOLE_KEYS = (  # could be parts of a model where others are beside them
    "module", "net", "network", "params", "weights", "generator", "netG", "online", "student", "teacher", "backbone",
)  # fmt: skip
# Moving averages of the weights: the raw weights are what was trained, so these come second.
AVERAGES = (
    "ema", "model_ema", "ema_model", "ema_state_dict", "ema_model_state_dict", "model_ema_state_dict",
    "state_dict_ema", "params_ema", "ema_params", "ema_weights", "g_ema", "averaged_model", "swa_model",
    "swa_state_dict",
)  # fmt: skip
# State of the training at a checkpoint's top level, no weights.
TRAINING = (
    "optim", "scheduler", "scaler", "lr_scheduler", "lr_sched", "grad_scaler", "amp", "rng", "random_state",
    "random_rng", "torch_rng", "cuda_rng", "np_rng", "callbacks", "loops", "hyper_parameters", "hparams", "epoch",
    "history", "metrics", "sampler", "args", "config",
)  # fmt: skip
# What torch.distributed writes into the pickle that says where tensors lie.
_METADATA = "torch.distributed.checkpoint.metadata."
DISTRIBUTED = frozenset(
    _METADATA + name
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
) | {
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "collections.OrderedDict",
}  # fmt: skip


def natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names as their numbers say: layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]
