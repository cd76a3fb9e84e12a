"""Inputs made from a model's configuration: no library is needed, only fields and the names of forward's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emscan
from emscan.errors import ProbeError
from emscan.probe import open_probe
from emscan.probe.configured import configured, has_configuration

IMAGE, PAD = 39, 0


class Config(SimpleNamespace):
    """A configuration; what has ``to_dict`` is one, inside another too."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Text(nn.Module):
    """A language model whose parameters are all optional, as usual in libraries."""

    def __init__(self, **fields: Any):
        super().__init__()
        self.config = Config(**{"vocab_size": 40, "pad_token_id": PAD, "image_token_id": IMAGE, **fields})
        self.words = nn.Embedding(40, 8)
        self.q, self.k, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 40)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.words(input_ids)
        scores = self.q(hidden) @ self.k(hidden).mT
        scores = scores.masked_fill(attention_mask[:, None] == 0, float("-inf"))
        return Output(None, self.head(scores.softmax(-1) @ hidden))


class Seen(Text):
    """A language model that also takes images: their rows replace the placeholders among the ids, one by one."""

    def __init__(self, asked: bool = True):
        super().__init__()
        self.config.vision_config = Config(image_size=12, patch_size=4, num_channels=1)
        self.patches = nn.Conv2d(1, 8, 4, 4)
        if asked:
            self.get_image_features = self.features

    def features(self, pixel_values):
        assert pixel_values.shape[2:] == (12, 12)
        return self.patches(pixel_values).flatten(2).mT.reshape(-1, 8)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None):
        hidden = self.words(input_ids)
        if pixel_values is not None:
            rows = self.features(pixel_values)
            places = input_ids == IMAGE
            if places.sum() != len(rows):
                raise ValueError(
                    f"Image features and image tokens do not match, tokens: {places.sum()}, features: {len(rows)}"
                )
            hidden = hidden.masked_scatter(places[..., None], rows)
        return {"logits": self.head(hidden.softmax(-1))}


class Listener(nn.Module):
    """An encoder and a decoder; the encoder accepts exactly twice its number of positions."""

    def __init__(self):
        super().__init__()
        self.config = Config(
            vocab_size=30, num_mel_bins=10, max_source_positions=20, is_encoder_decoder=True, decoder_start_token_id=1
        )
        self.conv, self.words, self.head = nn.Conv1d(10, 8, 3, 2, 1), nn.Embedding(30, 8), nn.Linear(8, 30)
        self.positions = nn.Parameter(torch.zeros(20, 8))

    def forward(self, input_features=None, attention_mask=None, decoder_input_ids=None):
        heard = self.conv(input_features).mT + self.positions
        said = self.words(decoder_input_ids)
        return (self.head((said @ heard.mT).softmax(-1) @ heard),)


class Waves(nn.Module):
    """One channel: plain (samples, time) does not fit."""

    def __init__(self):
        super().__init__()
        self.config = Config(sampling_rate=8000)
        self.conv = nn.Conv1d(1, 4, 16, 8)

    def forward(self, input_values):
        assert input_values.ndim == 3
        return self.conv(input_values).tanh()


class Pixels(nn.Module):
    """Images of the configured size and number of channels alone."""

    def __init__(self, size: Any = 24):
        super().__init__()
        self.config = Config(image_size=size, num_channels=2)
        self.conv = nn.Conv2d(2, 4, 4, 4)

    def forward(self, pixel_values, labels=None):
        height, width = (24, 24) if isinstance(self.config.image_size, int) else (24, 16)
        assert pixel_values.shape[2:] == (height, width)
        return self.conv(pixel_values).relu().mean((2, 3))


class Packed(nn.Module):
    """Patches of all images in one sequence, beside their grid: no input but the grid has a sample axis."""

    def __init__(self):
        super().__init__()
        self.config = Config(patch_size=4, in_channels=3, temporal_patch_size=2, spatial_merge_size=2)
        self.embed = nn.Linear(3 * 2 * 4 * 4, 8)

    def forward(self, hidden_states, grid_thw):
        assert int(grid_thw.prod(-1).sum()) == len(hidden_states)
        return self.embed(hidden_states).sigmoid()


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config(vocab_size=20, max_2d_position_embeddings=50)
        self.words, self.places = nn.Embedding(20, 4), nn.Embedding(50, 4)

    def forward(self, input_ids=None, bbox=None):
        assert bool((bbox[..., :2] <= bbox[..., 2:]).all())
        return (self.words(input_ids) + self.places(bbox).sum(-2)).tanh()


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config(vocab_size=20)
        self.words = nn.Embedding(20, 4)

    def forward(self, input_ids, moon_phase):
        return self.words(input_ids) * moon_phase["now"]


class KeywordOnly(nn.Module):
    """Keyword-only parameters and a nested output."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, *, left, right=None):
        hidden = self.one(left).relu()
        if right is not None:
            hidden = hidden + self.two(right).tanh()
        return {"scores": (Output(None, hidden.softmax(-1)), [hidden])}


def test_ids_avoid_what_the_configuration_gives_a_meaning():
    made = configured(Text(), 50)
    assert made.values["input_ids"].shape == made.values["attention_mask"].shape == (50, 16)
    ids = set(made.values["input_ids"].flatten().tolist())
    assert ids == set(range(40)) - {IMAGE, PAD}


def test_texts_fit_in_few_positions():
    assert configured(Text(max_position_embeddings=9), 2).values["input_ids"].shape == (2, 9)


def test_relative_positions_leave_the_length_open():
    assert configured(Text(max_position_embeddings=-1), 2).values["input_ids"].shape == (2, 16)


@pytest.mark.parametrize("asked", [True, False], ids=["by its method", "by its message"])
def test_an_image_gets_as_many_placeholders_as_it_has_rows(asked):
    made = configured(Seen(asked), 4)
    assert made.values["pixel_values"].shape == (4, 1, 12, 12)
    assert (made.values["input_ids"] == IMAGE).sum(1).tolist() == [9] * 4
    assert made.left_out == ()


def test_an_image_that_never_fits_is_left_out_and_said_to_be():
    model = Seen()
    model.config.vision_config = Config(image_size=13, patch_size=4, num_channels=1)
    made = configured(model, 2)
    assert set(made.values) == {"input_ids", "attention_mask"}
    assert made.left_out == ("image",)
    assert made.describe().endswith("(from the configuration), without image")


def test_a_spectrogram_and_what_the_decoder_says_so_far():
    made = configured(Listener(), 3)
    assert made.values["input_features"].shape == (3, 10, 40)
    assert made.values["decoder_input_ids"].shape == (3, 8)
    assert made.values["decoder_input_ids"].max() < 30


def test_a_waveform_with_a_channel_axis():
    assert configured(Waves(), 2).values["input_values"].shape == (2, 1, 4000)


@pytest.mark.parametrize(
    ("size", "shape"),
    [(24, (24, 24)), ([24, 16], (24, 16)), ({"height": 24, "width": 16}, (24, 16))],
    ids=["number", "pair", "named"],
)
def test_an_image_size_in_every_spelling(size, shape):
    assert configured(Pixels(size), 2).values["pixel_values"].shape == (2, 2, *shape)


def test_packed_patches_agree_with_their_grid():
    made = configured(Packed(), 3)
    assert made.values["hidden_states"].shape == (48, 96)
    assert made.values["grid_thw"].tolist() == [[1, 4, 4]] * 3


def test_boxes_have_ordered_corners():
    made = configured(Boxes(), 3)
    assert made.values["bbox"].shape == (3, 16, 4)
    assert made.values["bbox"].max() < 50


def test_the_same_seed_gives_the_same_values():
    one, two, other = (configured(Seen(), 4, seed=seed).values for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_values_have_the_dtype_of_the_model():
    made = configured(Pixels().to(torch.bfloat16), 2, distribution="uniform")
    assert made.values["pixel_values"].dtype == torch.bfloat16
    assert made.values["pixel_values"].min() >= 0


def test_the_model_and_the_generators_stay_as_they_were(untouched_generators):
    model = Seen().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with untouched_generators:
        configured(model, 2)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_synthetic_probe_asks_the_configuration_first():
    batch = next(iter(open_probe(None, Listener())))
    assert batch.samples == 64
    assert batch.kwargs["input_features"].shape == (64, 10, 40)


def test_a_batch_that_cannot_be_split_is_small():
    probe = open_probe(None, Packed())
    batches = list(probe)
    assert len(batches) == 1
    assert len(batches[0].kwargs["grid_thw"]) == 8


def test_a_configuration_of_something_else_is_no_hindrance():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model.config = Config(learning_rate=0.1)
    assert not has_configuration(model)
    assert emscan.audit(model).to_dict()["summary"]["hard"] == 1


def test_what_is_missing_is_named_in_one_line():
    with pytest.raises(ProbeError, match="moon_phase") as caught:
        open_probe(None, Strange())
    assert caught.value.message == (
        "no inputs could be made from the configuration of Strange: it says nothing about moon_phase"
    )
    assert "input_ids, moon_phase" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_what_the_model_said_of_the_first_try_is_passed_on():
    model = Pixels()
    model.config.num_channels = 3
    with pytest.raises(ProbeError, match=r"Pixels: the first try raised RuntimeError.*channels"):
        configured(model, 2)


@pytest.mark.parametrize("make", [Text, Seen, Listener, Waves, Pixels, Packed, Boxes])
def test_audits_need_no_inputs(make):
    document = emscan.audit(make()).to_dict()
    assert document["summary"]["status"] == "ok"
    assert document["probe"]["synthetic"]
    assert "from the configuration" in document["probe"]["source"]


# -- many inputs and outputs of every kind -----------------------------------------------------------------------------


def _verdicts(report: emscan.Report) -> list[str]:
    return [layer["verdict"] for layer in report.to_dict()["layers"] if layer["verdict"] != "none"]


def test_keyword_only_parameters_from_a_dict():
    model = KeywordOnly()
    both = {"left": torch.randn(6, 3), "right": torch.randn(6, 5)}
    assert _verdicts(emscan.audit(model, both)) == ["hard", "em", "em"]
    assert _verdicts(emscan.audit(model, {"left": both["left"]})) == ["hard", "em"]
    assert _verdicts(emscan.audit(model, [both, both])) == ["hard", "em", "em"]


def test_a_dict_with_what_is_no_tensor():
    inputs = {"input_ids": torch.randint(1, 30, (4, 5)), "attention_mask": torch.ones(4, 5), "labels": None}
    report = emscan.audit(Text(), inputs)
    assert report.to_dict()["probe"]["samples"] == 4
    assert _verdicts(report) == ["em"]


def test_a_dataclass_and_a_tuple_as_outputs():
    ids = torch.randint(1, 30, (4, 5))
    assert _verdicts(emscan.audit(Text(), (ids, torch.ones(4, 5)))) == ["em"]
    assert _verdicts(emscan.audit(Listener(), (torch.randn(2, 10, 40), None, ids[:2]))) == ["em"]


def test_a_missing_keyword_is_named():
    with pytest.raises(ProbeError, match="also needs left"):
        emscan.audit(KeywordOnly(), {"right": torch.randn(6, 5), "targets": torch.zeros(6).long()})
