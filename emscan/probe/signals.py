"""Audio, time series and trajectories made from a model's configuration; see `modalities`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emscan.probe.maker import LENGTH, Maker

FRAMES = 128  # of a spectrogram, where the configuration gives none
WAVE = 4000  # samples of a waveform
STEPS = 32  # of a time series
_LONGEST = 3000  # frames that a configuration may ask for


# -- audio -------------------------------------------------------------------------------------------------------


def _mels(maker: Maker) -> int:
    names = ("num_mel_bins", "n_mel_bins", "n_mels", "feature_projection_input_dim", "input_feat_per_channel")
    more = ("input_feat_size", "mel_dim", "input_dim", "feature_size", "input_size")
    return maker.whole(*names, *more, kind="audio", default=80)


def _frames(maker: Maker) -> int:
    positions = maker.whole("max_source_positions", kind="audio", default=0)
    frames = 2 * positions if 0 < 2 * positions <= _LONGEST else FRAMES
    window = 2 * maker.whole("n_window", kind="audio", default=0)  # frames come in whole windows
    return window * max(1, frames // window) if window else frames


def _features(maker: Maker) -> Tensor | None:
    if "audio" not in maker.groups:
        return None
    n, mels, frames = maker.samples, _mels(maker), _frames(maker)
    stacked = mels * maker.whole("num_stacked_frames", "stack_factor", "stride", kind="audio", default=1)
    shapes = [(n, mels, frames), (n, frames, mels)]
    if maker.look("max_source_positions", kind="audio") is None:
        shapes.reverse()
    more = [(n, frames, stacked), (n, frames, 2 * mels), (n, 1, frames, mels), (n, 1, mels, frames)]
    return maker.pick("audio", [*shapes, *more])


def _frame_mask(maker: Maker) -> Tensor | None:
    features = next((maker.values[name] for name in ("input_features", "audio_mel") if name in maker.values), None)
    if features is None:
        return None
    frames = _frames(maker)
    return torch.ones(maker.samples, frames if frames in features.shape[1:] else features.shape[1], dtype=torch.bool)


def _frame_counts(maker: Maker) -> Tensor | None:
    return torch.full((maker.samples,), _frames(maker)) if "audio" in maker.groups else None


def _wave(maker: Maker) -> Tensor | None:
    both = "input_features" in maker.names and "input_values" not in maker.required
    if "audio" not in maker.groups or both:
        return None
    n, unit = maker.samples, 1920  # a multiple of the strides of most codecs
    frames, mels = min(maker.whole("max_length", "max_time_bins", default=FRAMES), 1024), _mels(maker)
    shapes = [(n, WAVE), (n, 1, WAVE), (n, frames, mels), (n, 1, frames, mels), (n, 2 * unit), (n, 1, 2 * unit)]
    return maker.pick("audio", shapes)


# -- time series and trajectories -----------------------------------------------------------------------------------


def _past(maker: Maker) -> Tensor | None:
    if "series" not in maker.groups:
        return None
    lags = maker.look("lags_sequence", default=[0])
    longest = max(lags, default=0) if isinstance(lags, list | tuple) else 0
    length = maker.whole("context_length", default=STEPS) + longest
    channels = maker.whole("num_input_channels", "input_size", default=1)
    shapes: list[tuple[int, ...]] = [(maker.samples, length), (maker.samples, length, channels)]
    return maker.pick("series", shapes if channels == 1 else shapes[::-1])


def _past_ones(maker: Maker) -> Tensor | None:
    return torch.ones_like(maker.values["past_values"]) if "past_values" in maker.values else None


def _past_time(maker: Maker) -> Tensor | None:
    past = maker.values.get("past_values")
    return None if past is None else maker.floats(*past.shape[:2], maker.whole("num_time_features", default=0))


def _future(maker: Maker) -> Tensor | None:
    past = maker.values.get("past_values")
    if past is None or "past_time_features" not in maker.names:
        return None
    return maker.floats(maker.samples, maker.whole("prediction_length", default=STEPS), *past.shape[2:])


def _future_time(maker: Maker) -> Tensor | None:
    future = maker.values.get("future_values")
    return None if future is None else maker.floats(*future.shape[:2], maker.whole("num_time_features", default=0))


def _trajectory(*fields: str) -> Callable[[Maker], Tensor | None]:
    """Return a maker of one vector per step, as wide as the first of these fields says, else one number."""

    def make(maker: Maker) -> Tensor | None:
        if "trajectory" not in maker.groups:
            return None
        return maker.floats(maker.samples, LENGTH, maker.whole(*fields, default=1) if fields else 1)

    return make


def _timesteps(maker: Maker) -> Tensor | None:
    return torch.arange(LENGTH).expand(maker.samples, -1).contiguous() if "trajectory" in maker.groups else None


SIGNALS: dict[str, Callable[[Maker], Tensor | None]] = {
    "input_features": _features,
    "audio_mel": _features,
    "input_features_mask": _frame_mask,
    "feature_attention_mask": _frame_mask,
    "audio_mel_mask": _frame_mask,
    "audio_feature_lengths": _frame_counts,
    "feature_lens": _frame_counts,
    "input_values": _wave,
    "past_values": _past,
    "past_observed_mask": _past_ones,
    "past_time_features": _past_time,
    "future_values": _future,
    "future_time_features": _future_time,
    "states": _trajectory("state_dim"),
    "actions": _trajectory("act_dim"),
    "rewards": _trajectory(),
    "returns_to_go": _trajectory(),
    "timesteps": _timesteps,
}
