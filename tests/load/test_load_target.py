from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from emscan.errors import LoadError, ModelError, UsageError
from emscan.load import load

CODE = """
import torch
from torch import nn
import neighbour

print("imported")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, neighbour.WIDTH)
        self.out = nn.Linear(neighbour.WIDTH, 2)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))

    @classmethod
    def again(cls):
        return cls()

def factory():
    return Net()

instance = Net()
number = 3

def wrong():
    return "a string"

def needs(width):
    return Net()

def broken():
    x = []
    return x[4]

def stops():
    raise SystemExit(0)

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.LazyLinear(4)
        self.out = nn.LazyLinear(2)
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "net.py").write_text(CODE)
    yield str(tmp_path / "net.py")
    sys.modules.pop("neighbour", None)
    sys.modules.pop("net", None)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return nn.ModuleDict({"hidden": nn.Linear(3, 4), "out": nn.Linear(4, 2)}).state_dict()


def check(loaded, weights):
    assert loaded.weights is None
    assert loaded.info.parameters == 26
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.module.state_dict().items())


@pytest.mark.parametrize("attribute", ["Net", "factory", "instance", "Net.again", "Lazy"])
def test_file_target(code, weights, saved, attribute, capsys):
    before = list(sys.path)
    check(load(saved(weights), model_target=f"{code}:{attribute}"), weights)
    assert sys.path == before
    assert capsys.readouterr() == ("", "imported\n")


def test_module_target_from_the_current_folder(code, weights, saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check(load(saved(weights), model_target="net:factory"), weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_and_nesting(code, weights, saved, prefix):
    path = saved({"epoch": 3, "state_dict": {prefix + n: t for n, t in weights.items()}, "optimizer": {"state": {}}})
    loaded = load(path, model_target=f"{code}:Net")
    check(loaded, weights)
    assert loaded.notes[0] == "the model was found under 'state_dict'"
    assert all("prefix" in note for note in loaded.notes[1:])
    assert list(load(path).weights) == list(weights)


def test_a_compiled_part_and_a_part_called_module(saved, tmp_path):
    (tmp_path / "parts.py").write_text(
        "from torch import nn\ndef make():\n    return nn.ModuleDict({'module': nn.Linear(2, 2)})\n"
    )
    tensors = {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}
    loaded = load(saved(tensors), model_target=f"{tmp_path}/parts.py:make")
    assert loaded.notes == []
    compiled = {name.replace("module.", "module._orig_mod."): tensor for name, tensor in tensors.items()}
    inner = load(saved({"a." + n: t for n, t in compiled.items()}))
    assert list(inner.weights) == ["a.module.weight", "a.module.bias"]


def test_nested_dicts_become_dotted_names(saved):
    path = saved({"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.ones(3)}, "epoch": 1, "optimizer": {"m": 2}})
    loaded = load(path)
    assert list(loaded.weights) == ["encoder.w", "decoder.w"]
    assert loaded.notes == ["entries without weights were left out: epoch, optimizer"]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"net": {"w": torch.ones(1)}, "accuracy": torch.tensor(0.5)}, ["w"]),
        ({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}, "step": torch.tensor(3)}, ["w"]),
        ({"state_dict": {"model": {"w": torch.ones(1)}}}, ["w"]),
        ({"net": {"w": torch.ones(1)}, "head": {"w": torch.ones(1)}}, ["net.w", "head.w"]),
        ({"encoder": {"w": torch.ones(1)}}, ["encoder.w"]),
        ({"model": 3, "w": torch.ones(1)}, ["w"]),
        ({0: torch.ones(1), "b": [torch.ones(1)]}, ["0", "b.0"]),
    ],
)
def test_where_the_weights_are_found(saved, value, names):
    assert list(load(saved(value)).weights) == names


def test_converted_types_are_noted(code, weights, saved):
    half = {name: tensor.half() for name, tensor in weights.items()}
    loaded = load(saved(half), model_target=f"{code}:Net")
    assert loaded.notes == ["weights were converted from torch.float16 to torch.float32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out.bias": None}, "1 missing (out.bias)"),
        ({"more": torch.ones(1), "than": torch.ones(1)}, "2 unexpected (more, than)"),
        (
            {"out.weight": torch.ones(9, 9), "out.bias": torch.ones(7)},
            "2 of another shape (out.weight: (9, 9) in the file, (2, 4) in the model, ...)",
        ),
        (
            {"out.bias": None, "hidden.bias": torch.ones(1), "x.y": torch.ones(1)},
            "1 missing (out.bias), 1 unexpected (x.y), "
            "1 of another shape (hidden.bias: (1,) in the file, (4,) in the model)",
        ),
        ({f"x{i}": torch.ones(1) for i in range(9)}, "9 unexpected (x0, x1, x2 and 6 more)"),
    ],
)
def test_weights_that_do_not_fit(code, weights, saved, change, message):
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    path = saved(changed)
    with pytest.raises(LoadError) as caught:
        load(path, model_target=f"{code}:Net")
    assert str(caught.value) == (
        f"cannot load {path}: its weights do not fit {code}:Net: {message}; "
        "name the architecture that they were saved from with --model, or pass --partial to audit what fits"
    )


FORMS = "write --model package.module:callable or --model path/to/file.py:callable"


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("CODE", UsageError, f"--model CODE does not name a callable; {FORMS}"),
        (":Net", UsageError, f"--model :Net does not name a callable; {FORMS}"),
        ("nowhere.py:Net", UsageError, f"--model nowhere.py:Net: there is no file nowhere.py; {FORMS}"),
        ("no_such_pkg.net:Net", UsageError, f"--model no_such_pkg.net:Net: there is no module no_such_pkg; {FORMS}"),
        ("CODE:absent", UsageError, f"--model CODE:absent: CODE has no absent; {FORMS}"),
        ("CODE:number", UsageError, f"--model CODE:number is a int, neither a module nor callable; {FORMS}"),
        ("CODE:wrong", UsageError, f"--model CODE:wrong gives a str, not a torch.nn.Module; {FORMS}"),
        (
            "CODE:needs",
            UsageError,
            "--model CODE:needs cannot be called without arguments (missing a required argument: 'width'): it is "
            "needs(width); give --model-arg NAME=VALUE for each that it needs",
        ),
        (
            "CODE:broken",
            ModelError,
            "calling CODE:broken raised IndexError: list index out of range at CODE:35; "
            "this is the model's own code: mend it there",
        ),
        (
            "CODE:stops",
            ModelError,
            "calling CODE:stops raised SystemExit: 0 at CODE:38; this is the model's own code: mend it there",
        ),
    ],
)
def test_targets_that_fail(code, weights, saved, target, kind, message):
    with pytest.raises(kind) as caught:
        load(saved(weights), model_target=target.replace("CODE", code))
    assert str(caught.value) == message.replace("CODE", code)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "importing bad.py raised SyntaxError: .* at .*bad.py:1; this is the model's own code"),
        ("\nimport no_such_thing\n", "importing bad.py raised ModuleNotFoundError: .* at .*bad.py:2; this is"),
        ("1 / 0\n", "importing bad.py raised ZeroDivisionError: division by zero at .*bad.py:1; this is"),
    ],
)
def test_files_that_do_not_import(weights, saved, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ModelError, match=message):
        load(saved(weights), model_target=f"{tmp_path}/bad.py:f")


def test_a_whole_module_takes_no_target(code, saved):
    path = saved(nn.Linear(2, 2))
    with pytest.raises(UsageError) as caught:
        load(path, model_target=f"{code}:Net")
    assert str(caught.value) == f"{path} already holds its architecture (Linear); leave --model out"
