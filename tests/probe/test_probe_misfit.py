"""Probes that do not fit their model: one line that says what the model takes and what it got."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emscan
from emscan.errors import EmscanError, ModelError, ProbeError
from emscan.probe.batch import Batch
from emscan.probe.misfit import IdRanges, explain


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


class Positions(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(50, 8)
        self.table = nn.Parameter(torch.zeros(1, 5, 8))
        self.places = nn.Embedding(5, 8)
        self.register_buffer("types", torch.zeros(1, 5))

    def forward(self, ids: Tensor) -> Tensor:
        values = self.words(ids)
        if self.kind == "parameter":
            return values + self.table
        if self.kind == "lookup":
            return values + self.places(torch.arange(ids.shape[1]))
        return values + self.types.expand(ids.shape)[..., None]


class Functional(nn.Module):
    """No layer objects: parameters and functions."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 4:
            return nn.functional.conv2d(x, self.weight)
        return torch.flatten(x, 1) @ self.weight


def cut(width: int) -> nn.Module:
    return sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(width, 3))


FLOATS = torch.randn(4, 28, 28)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "images to a linear layer": (
        lambda: sequential(nn.Linear(784, 10), nn.ReLU()),
        FLOATS,
        "the model's linear layer (0) takes 784 features, the probe's input has 28 x 28; flatten each sample: x.reshape(N, -1)",
    ),
    "another width": (
        lambda: sequential(nn.Linear(784, 10)),
        torch.randn(4, 30),
        "the model's linear layer (0) takes 784 features, the probe's input has 30; put 784 features on the last axis",
    ),
    "features on axis 1": (
        lambda: sequential(nn.Linear(12, 10)),
        torch.randn(4, 12, 7),
        "the model's linear layer (0) takes 12 features, the probe's input has 12 x 7; "
        "put 12 features on the last axis, where axis 1 has them now: x.swapaxes(1, -1)",
    ),
    "a product": (
        lambda: Functional(8, 3),
        torch.randn(2, 7),
        "the model's linear layer (weight) takes 8 features, the probe's x has 7; put 8 features on the last axis",
    ),
    "ids to a linear layer": (
        lambda: sequential(nn.Linear(6, 10)),
        torch.ones(4, 6, dtype=torch.int64),
        "the model's linear layer (0) computes in float32, the probe's input holds int64; "
        "give floating-point features, not ids or labels",
    ),
    "doubles": (
        lambda: sequential(nn.Linear(6, 10)),
        torch.ones(4, 6, dtype=torch.float64),
        "the model's linear layer (0) computes in float32, the probe's input holds float64; convert it: input.to(torch.float32)",
    ),
    "ids beyond the table": (
        lambda: sequential(nn.Embedding(30522, 4)),
        torch.tensor([[1, 50256]]),
        "the ids in the probe's input go up to 50,256, the model's embedding (0) has 30,522 rows (0 to 30,521); "
        "tokenize with the model's own tokenizer",
    ),
    "ids of a bag": (
        lambda: sequential(nn.EmbeddingBag(10, 4)),
        torch.tensor([[1, 12]]),
        "the ids in the probe's input go up to 12, the model's embedding (0) has 10 rows (0 to 9); "
        "tokenize with the model's own tokenizer",
    ),
    "negative ids": (
        lambda: sequential(nn.Embedding(10, 4)),
        torch.tensor([[1, -100]]),
        "the ids in the probe's input go down to -100, the model's embedding (0) has 10 rows (0 to 9); "
        "fill up with the model's pad id; what the loss ignores belongs to the targets",
    ),
    "floats as ids": (
        lambda: sequential(nn.Embedding(10, 4)),
        torch.randn(2, 3),
        "the model's embedding (0) takes integer ids (0 to 9), the probe's input holds float32; give token ids as integers",
    ),
    "channels last": (
        lambda: sequential(nn.Conv2d(3, 4, 3)),
        torch.randn(4, 28, 28, 3),
        "the model's convolution (0) takes (N, 3, height, width), the probe's input is (4, 28, 28, 3): channels last; "
        "move the channels to axis 1: input.permute(0, 3, 1, 2)",
    ),
    "channels last, one axis": (
        lambda: sequential(nn.Conv1d(3, 4, 3)),
        torch.randn(4, 9, 3),
        "the model's convolution (0) takes (N, 3, length), the probe's input is (4, 9, 3): channels last; "
        "move the channels to axis 1: input.permute(0, 2, 1)",
    ),
    "gray images": (
        lambda: sequential(nn.Conv2d(3, 4, 3)),
        torch.randn(4, 1, 28, 28),
        "the model's convolution (0) takes (N, 3, height, width), the probe's input is (4, 1, 28, 28): "
        "1 channel; give 3 channels",
    ),
    "groups": (
        lambda: sequential(nn.Conv2d(6, 6, 3, groups=3)),
        torch.randn(4, 2, 28, 28),
        "the model's convolution (0) takes (N, 6, height, width), the probe's input is (4, 2, 28, 28): "
        "2 channels; give 6 channels",
    ),
    "transposed": (
        lambda: sequential(nn.ConvTranspose2d(3, 4, 3)),
        torch.randn(4, 5, 9, 9),
        "the model's convolution (0) takes (N, 3, height, width), the probe's input is (4, 5, 9, 9): 5 channels; give 3 channels",
    ),
    "no channel axis": (
        lambda: sequential(nn.Conv2d(1, 4, 3)),
        FLOATS,
        "the model's convolution (0) takes (N, 1, height, width), the probe's input is (4, 28, 28); "
        "add an axis for the channel: input[:, None]",
    ),
    "a function": (
        lambda: Functional(4, 3, 3, 3),
        torch.randn(4, 28),
        "the model's convolution (weight) takes (N, 3, height, width), the probe's x is (4, 28); give 4 axes, samples on axis 0",
    ),
    "bytes": (
        lambda: sequential(nn.Conv2d(3, 4, 3)),
        torch.zeros(4, 3, 9, 9, dtype=torch.uint8),
        "the model's convolution (0) computes in float32, the probe's input holds uint8; "
        "convert it to floating point, scaled as in training (0 to 1, normalized)",
    ),
    "small images": (
        lambda: sequential(nn.Conv2d(3, 4, 3)),
        torch.zeros(4, 3, 2, 2),
        "the model's convolution (0) has a kernel of 3 x 3, the probe's input is 2 x 2; give larger samples",
    ),
    "images of another size": (
        lambda: cut(36),
        torch.zeros(4, 3, 9, 9),
        "the model's linear layer (2) takes 36 features and gets 196 from the layers before it; "
        "the probe (input (4, 3, 9, 9)) is of another size than the model was made for",
    ),
    "batch norm": (
        lambda: sequential(nn.BatchNorm1d(3)),
        torch.zeros(4, 9, 3),
        "the model's normalization (0) takes 3 features on axis 1, the probe's input is (4, 9, 3); "
        "check the order and the sizes of its axes",
    ),
    "batch norm of images": (
        lambda: sequential(nn.BatchNorm2d(3)),
        torch.zeros(4, 9, 3),
        "the model's normalization (0) takes 3 features on axis 1, the probe's input is (4, 9, 3); "
        "check the order and the sizes of its axes",
    ),
    "layer norm": (
        lambda: sequential(nn.LayerNorm(3)),
        torch.zeros(4, 9, 4),
        "the model's normalization (0) takes 3 features on the last axis, the probe's input is (4, 9, 4); "
        "check the order and the sizes of its axes",
    ),
    "recurrence": (
        lambda: nn.GRU(3, 4, batch_first=True),
        torch.zeros(4, 6, 5),
        "the model's recurrent layer (weight_ih_l0) takes 3 features, the probe's input has 6 x 5; "
        "put 3 features on the last axis",
    ),
    "positions in a parameter": (
        lambda: Positions("parameter"),
        torch.ones(2, 6, dtype=torch.int64),
        "the model's table of shape (1, 5, 8) meets values of shape (2, 6, 8); "
        "the probe (ids (2, 6)) is of another size or length than the model was made for",
    ),
    "positions in an embedding": (
        lambda: Positions("lookup"),
        torch.ones(2, 6, dtype=torch.int64),
        "the model's embedding (places) has 5 rows (0 to 4), row 5 is looked up; "
        "shorten the samples: the probe's ids has 6 positions",
    ),
    "positions in a buffer": (
        lambda: Positions("buffer"),
        torch.ones(2, 6, dtype=torch.int64),
        "the model's types has shape (1, 5), (2, 6) is asked for; shorten the samples: the probe's ids has 6 positions",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_model_takes_and_what_it_got(case):
    make, value, message = CASES[case]
    with pytest.raises(ProbeError) as error:
        emscan.audit(make(), value)
    assert str(error.value) == message


@pytest.mark.parametrize("case", CASES)
def test_an_explanation_leaves_model_and_batch_alone(case):
    make, value, _ = CASES[case]
    model, before = make().train(), value.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Exception) as error:  # noqa: PT011 - what torch raises
        model.eval()(value)
    model.train()
    explain(model, Batch((value,), {}, None, len(value)), error.value)
    assert torch.equal(value, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(2, 3, 8, 8))])
def test_torchscript_is_explained_too(how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = how(cut(144))
    with pytest.raises(ProbeError) as error:
        emscan.audit(model, torch.zeros(4, 3, 9, 9))
    assert "the model's linear layer (2) takes 144 features and gets 196 from the layers before it" in str(error.value)
    with pytest.raises(ProbeError, match="channels last; move the channels to axis 1"):
        emscan.audit(model, torch.zeros(4, 8, 8, 3))


def test_attention_gets_features():
    tokens = torch.zeros(4, 6, 4)
    with pytest.raises(ProbeError) as error:
        emscan.audit(nn.MultiheadAttention(8, 2, batch_first=True), (tokens, tokens, tokens))
    assert "attention (in_proj_weight) takes 8 features, the probe's query has" in str(error.value)


class Broken(nn.Module):
    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.fc(x))


@pytest.mark.parametrize(
    "how",
    [lambda x: {}["missing"], lambda x: x.view(3, 3), lambda x: torch.linalg.cholesky(x), lambda x: x + torch.ones(4)],
    ids=["python", "view", "cholesky", "sum"],
)
def test_what_is_not_the_probes_fault_stays_the_models(how):
    with pytest.raises(ModelError, match="running the model raised"):
        emscan.audit(Broken(how), torch.randn(7, 5))


def test_a_later_batch_that_does_not_fit_is_explained_too():
    batches = [torch.tensor([[1, 2]]), torch.tensor([[3, 99]])]
    with pytest.raises(ProbeError, match="go up to 99, the model's embedding"):
        emscan.audit(sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), batches)


def test_a_failure_that_the_model_survives_explains_nothing():
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.two(x)
            except RuntimeError:
                pass
            raise ValueError("sorry, no")

    with pytest.raises(EmscanError, match="sorry, no"):
        emscan.audit(Tries(), torch.randn(3, 5))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            torch.tensor([0, 1, 7]),
            "the probe's targets name classes from 0 to 7, the model has 3 scores (0 to 2); number the classes as in training",
        ),
        (torch.tensor([0, -1, 2]), "the probe's targets name classes from -1 to 2, the model has 3 scores (0 to 2)"),
        (torch.tensor([0.0, 1.0, 2.0]), "cross-entropy takes integer targets, the probe's hold float32"),
    ],
)
def test_targets_that_name_no_class(targets, message):
    model, inputs = sequential(nn.Linear(6, 3)), torch.randn(3, 6)
    with pytest.raises(ProbeError) as error:
        emscan.audit(model, inputs, targets=targets, objective="cross-entropy")
    assert message in str(error.value)
    assert emscan.audit(model, inputs, targets=targets).probe.objective.startswith("none (")


def test_ignored_targets_name_no_class():
    report = emscan.audit(
        sequential(nn.Linear(6, 3)), torch.randn(3, 6), targets=torch.tensor([0, -100, 2]), objective="cross-entropy"
    )
    assert report.probe.objective == "cross-entropy (as asked)"


# ---- before the run, where a device could not go on after it --------------------------------------------------------


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(20, 4), nn.Embedding(2, 4)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor) -> Tensor:
        flat = ids.reshape(-1).to(torch.int32)
        words = self.words(flat).view(*ids.shape, -1)
        return (words + self.kinds(kinds)) * mask[..., None]


def call(high: int, kind: int) -> tuple[Batch, dict[str, Tensor]]:
    ids, kinds, mask = torch.tensor([[0, high]]), torch.tensor([[0, kind]]), torch.tensor([[1, 700]])
    return Batch((ids, kinds), {"mask": mask}, None, 1), {"ids": ids, "kinds": kinds, "mask": mask}


def test_rows_that_integers_index_are_learned_from_shapes():
    ranges = IdRanges(TwoTables())
    ranges.compare(*call(19, 1))
    with pytest.raises(ProbeError) as error:
        ranges.compare(*call(20, 1))
    assert str(error.value) == (
        "the ids in the probe's ids go up to 20, the model's embedding (words) has 20 rows (0 to 19); "
        "tokenize with the model's own tokenizer"
    )
    with pytest.raises(ProbeError, match=r"the probe's kinds go up to 2, the model's embedding \(kinds\) has 2 rows"):
        ranges.compare(*call(19, 2))
    ranges.check(call(20, 1)[0])  # on the processor the run itself raises
