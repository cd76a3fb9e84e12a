"""Probes from Python objects and from the user's own code."""

from __future__ import annotations

import gc
import textwrap
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from emscan.errors import ProbeError, UsageError
from emscan.probe import from_python, open_probe

NET = nn.Linear(6, 3)
X = torch.randn(23, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(23) % 3


class Two(nn.Module):
    """forward(a, b=None), with a parameter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.fc(a if b is None else a + b)


def loader(*, pairs: bool, size: int = 10):
    for start in range(0, len(X), size):
        part = slice(start, start + size)
        yield (X[part], Y[part]) if pairs else X[part]


def inputs_of(probe) -> Tensor:
    return torch.cat([batch.args[0] for batch in probe])


def targets_of(probe) -> Tensor:
    return torch.cat([batch.targets for batch in probe])


@given(samples=st.integers(1, 40), size=st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_splitting_loses_and_repeats_nothing(samples, size):
    x, y = torch.arange(samples * 6.0).view(samples, 6), torch.arange(samples)
    probe = from_python(x, y, NET, batch_size=size)
    batches = list(probe)
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), x)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), y)
    assert all(batch.samples == len(batch.args[0]) <= size for batch in batches)
    assert (probe.info.samples, probe.info.batches) == (samples, len(batches))
    assert probe.total_batches == len(batches)


@pytest.mark.parametrize(
    "inputs",
    [X, (X,), [X], {"input": X}, {"whatever": X}, X.numpy(), [X[:10], X[10:20], X[20:]], [(X[:20],), (X[20:],)]],
    ids=["tensor", "tuple", "list", "dict", "dict by order", "array", "batches", "tuple batches"],
)
def test_the_same_samples_in_every_form(inputs):
    probe = from_python(inputs, None, NET)
    assert torch.equal(inputs_of(probe), X)
    assert probe.info.samples == 23
    assert not probe.info.synthetic


@pytest.mark.parametrize(
    "inputs",
    [(X, Y), [X, Y], [(X[:9], Y[:9]), (X[9:], Y[9:])], {"x": X, "labels": Y}, [{"x": X, "target": Y}]],
    ids=["pair", "list pair", "loader", "dict", "dict batches"],
)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_targets_are_found(inputs, batch_size):
    probe = from_python(inputs, None, NET, batch_size=batch_size)
    assert torch.equal(targets_of(probe), Y)
    assert torch.equal(inputs_of(probe), X)


def test_a_loader_gives_targets_beside_an_optional_parameter_and_a_tuple_gives_arguments():
    (batch,) = from_python([(X, Y)], None, Two())
    assert batch.targets is not None
    assert len(batch.args) == 1
    (batch,) = from_python((X, X), None, Two())
    assert batch.targets is None
    assert len(batch.args) == 2


@pytest.mark.parametrize("targets", [Y, Y.numpy(), [Y[:10], Y[10:20], Y[20:]]])
def test_targets_beside_batches(targets):
    batches = [X[:10], X[10:20], X[20:]]
    assert torch.equal(targets_of(from_python(batches, targets, NET)), Y)


@pytest.mark.parametrize("targets", [Y[:12], torch.arange(30), [Y[:10]], [Y[:10], Y[10:20], Y[20:], Y]])
def test_targets_of_another_length_are_refused(targets):
    with pytest.raises(ProbeError, match="targets"):
        list(from_python([X[:10], X[10:20], X[20:]], targets, NET))


def test_one_tensor_given_twice_stays_one():
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    tokens = torch.randn(5, 4, 6)
    (batch,) = from_python((tokens, tokens, tokens), None, attention)
    assert batch.args[0] is batch.args[1] is batch.args[2]
    assert batch.args[0] is not tokens


def test_other_arguments_pass_through():
    state = (torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))
    lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
    (batch,) = from_python((torch.randn(4, 7, 6), state), None, lstm)
    assert isinstance(batch.args[1], tuple)
    assert torch.equal(lstm(*batch.args)[0], lstm(batch.args[0])[0])
    packed = pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    (batch,) = from_python(packed, None, lstm)
    assert batch.args[0] is packed
    assert batch.samples == 2
    (batch,) = from_python({"a": X, "b": None}, None, Two())
    assert batch.args[1] is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_time_is_never_cut(wrapped):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)

    sequences = torch.randn(2000, 3, 6)
    probe = from_python(sequences, None, Turned() if wrapped else nn.GRU(6, 5))
    assert probe.total_batches == (2 if wrapped else 1)
    assert torch.equal(inputs_of(probe), sequences)


def test_the_users_tensors_are_not_written_on():
    mine = X.clone().requires_grad_()
    for batch in from_python(mine, Y, NET, batch_size=8):
        assert not batch.args[0].requires_grad
        batch.args[0].zero_()
    assert torch.equal(mine, X)


def test_live_tensors_keep_their_dtype_and_arrays_take_the_models():
    assert from_python(X.double(), None, NET).__iter__().__next__().args[0].dtype == torch.float64
    assert next(iter(from_python(X.double().numpy(), None, NET))).args[0].dtype == torch.float32
    assert next(iter(from_python([np.zeros((2, 6))], None, NET))).args[0].dtype == torch.float32


def test_a_generator_is_read_one_batch_at_a_time():
    alive: list[weakref.ref] = []

    def stream():
        for _ in range(200):
            batch = torch.zeros(10, 6)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    probe = from_python(stream(), None, NET)
    assert not alive
    most = 0
    for _ in probe:
        gc.collect(0)
        most = max(most, sum(reference() is not None for reference in alive))
    assert most <= 2
    assert probe.info.samples == 2000
    assert probe.total_batches is None
    with pytest.raises(ProbeError, match="used up"):
        list(probe)


def test_a_look_at_the_first_batch_does_not_shorten_the_account():
    probe = from_python(X, None, NET, batch_size=5)
    list(probe)
    next(iter(probe))
    assert (probe.info.samples, probe.info.batches) == (23, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "the input is a str"),
        (3, "the input is a int"),
        ([], "holds no sample"),
        (iter(()), "holds no sample"),
        (torch.zeros(0, 6), "holds no sample"),
        ([3, 4], "batch 1 of the probe is a int"),
        ((X, X, X), "more than forward(input) takes"),
        ((), "also needs input"),
        ((X, Y[:4]), "disagree on the number of samples"),
        (np.array(["a"]), "data, not numbers"),
    ],
)
def test_what_is_no_input_is_refused_in_one_line(inputs, message):
    with pytest.raises(ProbeError) as error:
        list(from_python(inputs, None, NET))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_size_needs_samples_on_one_axis():
    with pytest.raises(ProbeError, match="disagree"):
        from_python((X, torch.zeros(3, 6)), None, Two(), batch_size=2)
    with pytest.raises(UsageError, match="not positive"):
        from_python(X, None, NET, batch_size=-1)


def test_reading_touches_no_global_generator(untouched_generators):
    with untouched_generators:
        list(from_python((X, Y), None, NET, batch_size=3))


# ---- the user's own code -----------------------------------------------------------------------------------------

CODE = """
    import torch

    X = torch.arange(24.0).view(4, 6)

    def tensor():
        return X

    def batches():
        print("loading")
        yield X[:3]
        yield X[3:]

    def pairs():
        return [(X, torch.arange(4))]

    class Data:
        rows = [X[:2], X[2:]]

    def broken():
        yield X
        raise RuntimeError("the disk is full")

    def failing():
        raise KeyError("no such column")

    def needs(path):
        return X

    def nothing():
        return None
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "my_data.py")


@pytest.mark.parametrize("place", ["file", "module"])
@pytest.mark.parametrize("name", ["tensor", "batches", "pairs", "Data.rows"])
def test_code_gives_batches_at_every_pass_and_prints_to_stderr(code, capsys, place, name):
    spec = f"{code if place == 'file' else 'my_data'}:{name}"
    probe = open_probe(spec, NET.double())
    NET.float()
    for _ in range(2):
        inputs = inputs_of(probe)
        assert torch.equal(inputs, torch.arange(24.0, dtype=torch.float64).view(4, 6))
    assert probe.info.source.startswith(spec)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "raised RuntimeError: the disk is full"),
        ("failing", "raised KeyError: 'no such column'"),
        ("needs", "cannot be called without arguments"),
        ("nothing", "the input is a NoneType"),
        ("missing", "has no missing"),
    ],
)
def test_errors_name_the_users_own_line(code, name, message):
    with pytest.raises(ProbeError) as error:
        list(open_probe(f"{code}:{name}", NET))
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    if "raised" in message:
        assert "my_data.py:" in text


def test_code_that_does_not_import(tmp_path):
    (tmp_path / "bad.py").write_text("import torch\ndef make(:")
    with pytest.raises(ProbeError, match=r"importing .* raised SyntaxError.*bad\.py:2"):
        open_probe(f"{tmp_path / 'bad.py'}:make", NET)
    (tmp_path / "raises.py").write_text("raise SystemExit(0)")
    with pytest.raises(ProbeError, match="raised SystemExit"):
        open_probe(f"{tmp_path / 'raises.py'}:make", NET)
