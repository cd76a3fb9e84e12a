"""Synthetic probes: the shape is derived, the samples stay apart, the model comes back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emscan.errors import ProbeError, UsageError
from emscan.probe import open_probe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]


class Patches(nn.Module):
    """A vision transformer: only images of 32 x 32 fit the position table."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 17, 16))
        self.first = nn.Parameter(torch.zeros(1, 1, 16))
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)
        return self.encoder(tokens + self.position)[:, 0]


class Words(nn.Module):
    """A language model whose parameters are optional, as usual in libraries; at most 12 tokens."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(40, 16), nn.Embedding(12, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids=None, attention_mask=None):
        positions = torch.arange(input_ids.shape[1])
        return {"logits": self.head(self.words(input_ids) + self.positions(positions))}


class Rows(nn.Module):
    """Hand-written attention over 8 rows: run on (samples, features) it would attend over the samples."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return (self.q(y) @ self.k(y).transpose(-2, -1)).softmax(-1) @ self.v(y)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.transpose(0, 1))[0][-1]


class Ratings(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(30, 4), nn.Embedding(9, 4)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


def lenet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 12 * 12, 10))


ARCHITECTURES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), [(256, 12)]),
    "lenet": (lenet, [(256, 1, 28, 28)]),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5), nn.AdaptiveAvgPool1d(1)), [(256, 3, 64)]),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), [(256, 2, 16, 16, 16)]),
    "wide stem": (lambda: nn.Conv2d(3, 4, 7, 2), [(111, 3, 224, 224)]),
    "transposed": (lambda: nn.ConvTranspose2d(6, 3, 4), [(256, 6, 8, 8)]),
    "patches": (Patches, [(256, 3, 32, 32)]),
    "words": (Words, [(256, 12)]),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(30, 6), nn.Linear(6, 2)), [(256, 16)]),
    "lstm": (lambda: nn.LSTM(5, 7, batch_first=True), [(256, 16, 5)]),
    "lstm, time first": (lambda: nn.LSTM(5, 7), [(16, 256, 5)]),
    "lstm, turned": (Turned, [(256, 16, 5)]),
    "gru cell": (lambda: nn.GRUCell(5, 7), [(256, 5)]),
    "rows": (Rows, [(256, 16, 5)]),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), [(256, 16, 8)] * 3),
    "encoder, time first": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1), [(16, 256, 8)]),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 2)), [(256, 9)]),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 2)), [(256, 9)]),
    "bilinear": (lambda: nn.Bilinear(5, 7, 2), [(256, 5), (256, 7)]),
    "ratings": (Ratings, [(256, 9), (256, 9)]),
    "float64": (lambda: nn.Linear(6, 2, dtype=torch.float64), [(256, 6)]),
}
RUN = {**ARCHITECTURES, "script": (lambda: torch.jit.script(lenet()), [(256, 1, 28, 28)])}
RUN["trace"] = (lambda: torch.jit.trace(Rows().eval(), torch.randn(3, 8, 5)), [(256, 16, 5)])


def whole(probe) -> list[Tensor]:
    batches = list(probe)
    axis = 1 if len(batches) == 1 and batches[0].args[0].shape[0] != batches[0].samples else 0
    return [torch.cat([batch.args[i] for batch in batches], axis) for i in range(len(batches[0].args))]


@pytest.mark.parametrize("name", RUN)
def test_derived_shapes(name, untouched_generators):
    make, shapes = RUN[name]
    module = make()
    with untouched_generators:
        probe = open_probe(None, module)
        inputs = whole(probe)
    assert [tuple(tensor.shape) for tensor in inputs] == shapes
    assert probe.info.synthetic
    assert probe.info.source.startswith("synthetic: ")
    for batch in probe:
        module.eval()(*batch.args, **batch.kwargs)


def test_exported_programs_remember_their_inputs():
    static = torch.export.export(Words().eval(), (torch.randint(0, 40, (4, 6)),)).module()
    probe = open_probe(None, static)
    assert {tuple(batch.args[0].shape) for batch in probe} == {(4, 6)}
    assert probe.info.samples == 256
    size = {"x": {0: torch.export.Dim("size")}}
    dynamic = torch.export.export(Rows().eval(), (torch.randn(4, 8, 5),), dynamic_shapes=size).module()
    assert [tuple(batch.args[0].shape) for batch in open_probe(None, dynamic)] == [(256, 8, 5)]
    with pytest.raises(UsageError, match="exactly 4 samples"):
        open_probe(None, static, batch_size=3)


def test_ids_stay_in_range_and_use_all_of_it():
    (ids,) = whole(open_probe(None, Words()))
    assert (int(ids.min()), int(ids.max())) == (0, 39)


@pytest.mark.parametrize(
    ("spec", "low", "high"), [("random", -9, 9), ("random:normal", -9, 9), ("random:uniform", 0, 1)]
)
def test_distributions(spec, low, high):
    module = nn.Linear(12, 3)
    (values,) = whole(open_probe(spec, module, seed=4))
    assert low <= float(values.min()) < float(values.max()) <= high
    mean, deviation = (0.5, 12**-0.5) if spec == "random:uniform" else (0.0, 1.0)
    assert float(values.double().mean()) == pytest.approx(mean, abs=0.1)
    assert float(values.double().std()) == pytest.approx(deviation, abs=0.1)
    probe = open_probe(spec, module, seed=4)
    assert torch.equal(whole(probe)[0], values)
    assert (probe.info.synthetic, probe.info.seed) == (True, 4)
    assert not torch.equal(whole(open_probe(spec, module, seed=5))[0], values)


def test_the_model_comes_back_as_it_was():
    class Caching(nn.Module):
        """BatchNorm in training mode, a mode that differs inside, a hook, and a tensor cached in forward."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = self.norm(self.conv(x))
            return self.drop(self.last)

    model = Caching().train()
    model.norm.eval()
    seen: list[object] = []
    model.conv.register_forward_hook(lambda *_: seen.append(None))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    open_probe(None, model)
    assert seen
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.calls == 0
    assert not hasattr(model, "last")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("module", [nn.Softmax(1), nn.CosineSimilarity()])
def test_a_model_without_parameters_needs_a_probe(module):
    with pytest.raises(ProbeError) as error:
        open_probe(None, module)
    assert "give --probe FILE.safetensors with tensors for" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_nothing_fits_says_what_it_raised():
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, path):
            raise FileNotFoundError("no such dictionary")

    with pytest.raises(ProbeError, match=r"FileNotFoundError: no such dictionary.*tensors for x, path"):
        open_probe(None, Fussy())
