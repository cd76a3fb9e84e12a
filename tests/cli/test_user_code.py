"""--model, --model-arg, --partial and the user's own exceptions, through the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from emscan import cli

CODE = """
from torch import nn, relu
import beside

class Net(nn.Module):
    def __init__(self, width=4, act="relu", *, classes=2):
        super().__init__()
        self.hidden, self.out, self.act = nn.Linear(3, width), nn.Linear(width, classes), act

    def forward(self, x):
        from later import gate
        return self.out(gate(self.hidden(x)))

class Breaks(Net):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        raise KeyError("no such thing\\x1b[31m")

def fails(width=3):
    return inner(width)

def inner(width):
    raise ValueError(f"width {width} is odd")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "later.py").write_text("from torch import relu as gate\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('a neighbour must not stand in for the standard library')\n")
    torch.manual_seed(0)
    torch.save(nn.ModuleDict({"hidden": nn.Linear(3, 4), "out": nn.Linear(4, 2)}).state_dict(), tmp_path / "w.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield tmp_path
    for name in ("beside", "later"):
        sys.modules.pop(name, None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["emscan", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run


def test_arguments_reach_the_callable_and_the_report(folder, ran):
    torch.save(nn.ModuleDict({"hidden": nn.Linear(3, 6), "out": nn.Linear(6, 5)}).state_dict(), folder / "w.pt")
    status, out, _ = ran(
        "audit", folder / "w.pt", "--model", f"{folder}/net.py:Net", "--model-arg", "width=6", "--model-arg", "classes=5",
        "--model-arg", "act=silu", "--format", "json",
    )  # fmt: skip
    assert status == 0
    model = json.loads(out)["model"]
    assert model["arguments"] == {"width": 6, "classes": 5, "act": "silu"}
    assert model["target"] == f"{folder}/net.py:Net"
    assert model["parameters"] == 3 * 6 + 6 + 6 * 5 + 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["widht=6"], "cannot be called with widht (got an unexpected keyword argument 'widht'): it is "
         "Net(width=4, act='relu', *, classes=2); did you mean width?"),
        (["width"], "--model-arg width is not of the form NAME=VALUE; write e.g. --model-arg width=64"),
        (["1=2"], "--model-arg 1=2 is not of the form NAME=VALUE; write e.g. --model-arg width=64"),
        (["width=1", "width=2"], "--model-arg gives width twice; give each name once"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(folder, ran, arguments, message):
    given = [part for argument in arguments for part in ("--model-arg", argument)]
    status, out, err = ran("audit", folder / "w.pt", "--model", f"{folder}/net.py:Net", *given)
    assert (status, out) == (2, "")
    assert err.startswith("emscan: error: ")
    assert err.endswith(f"{message}\n")
    assert err.count("\n") == 1


def test_arguments_without_a_target(folder, ran):
    status, _, err = ran("audit", folder / "w.pt", "--model-arg", "width=3")
    expected = "emscan: error: --model-arg has nothing to go to; name the architecture with --model\n"
    assert (status, err) == (2, expected)


def test_an_exception_is_shown_with_the_users_own_traceback(folder, ran):
    status, out, err = ran("audit", folder / "w.pt", "--model", f"{folder}/net.py:fails")
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{folder}/net.py", line 22, in fails'
    assert f'  File "{folder}/net.py", line 25, in inner' in lines
    assert lines[-2] == "ValueError: width 3 is odd"
    assert lines[-1] == (
        f"emscan: error: calling {folder}/net.py:fails raised ValueError: width 3 is odd at {folder}/net.py:25; "
        "this is the model's own code: mend it there"
    )
    assert "emscan/" not in "\n".join(lines[:-1])


def test_an_exception_in_forward_is_shown_too(folder, ran):
    torch.save(torch.randn(4, 3), folder / "x.pt")
    status, _, err = ran("audit", folder / "w.pt", "--model", f"{folder}/net.py:Breaks", "--probe", folder / "x.pt")
    lines = err.splitlines()
    assert status == 2
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{folder}/net.py", line 16, in forward'
    assert "\x1b" not in err
    assert lines[-1].startswith("emscan: error: running the model raised KeyError")


def test_a_syntax_error_shows_the_line(folder, ran):
    (folder / "bad.py").write_text("x = 1\ndef f(:\n")
    status, _, err = ran("audit", folder / "w.pt", "--model", f"{folder}/bad.py:f")
    assert status == 2
    assert f'  File "{folder}/bad.py", line 2' in err
    assert "    def f(:" in err


def test_a_model_of_no_user_code_fails_in_one_line(folder, ran):
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), folder / "wrong.pt")
    torch.save(torch.randn(4, 3), folder / "x.pt")
    status, out, err = ran("audit", folder / "wrong.pt", "--probe", folder / "x.pt")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def half(folder: Path) -> None:
    weights = torch.load(folder / "w.pt")
    del weights["out.bias"]
    weights["out.weight"] = torch.ones(9, 9)
    torch.save({**weights, "more": torch.ones(3)}, folder / "half.pt")


def test_half_loaded_weights_are_audited_only_when_told_to(folder, ran):
    half(folder)
    target = ("audit", folder / "half.pt", "--model", f"{folder}/net.py:Net")
    status, out, err = ran(*target)
    said = "1 missing (out.bias), 1 unexpected (more), 1 of another shape (out.weight: (9, 9) in the file, (2, 4) in the model)"
    assert (status, out) == (2, "")
    assert said in err
    assert err.endswith("or pass --partial to audit what fits\n")
    status, out, err = ran(*target, "--partial", "--format", "json")
    assert status == 0
    assert f"with --partial, 2 tensors were loaded; {said}" in err
    document = json.loads(out)
    assert document["model"]["partial"] == {
        "loaded": 2, "missing": ["out.bias"], "unexpected": ["more"],
        "mismatched": [{"name": "out.weight", "file": [9, 9], "model": [2, 4]}],
    }  # fmt: skip
    finding = next(f for f in document["findings"] if f["rule"] == "EM905")
    assert finding["message"] == "2 tensors of the model are not from the file: out.bias, out.weight"
    _, text, _ = ran(*target, "--partial")
    assert "PARTIAL WEIGHTS: 2 tensors of the model are not from the file." in text


def test_weights_of_which_none_fits_are_refused_all_the_same(folder, ran):
    torch.save({"a": torch.ones(3)}, folder / "other.pt")
    status, _, err = ran("audit", folder / "other.pt", "--model", f"{folder}/net.py:Net", "--partial")
    assert status == 2
    assert "none of its weights fits" in err


def test_weights_that_fit_have_no_misfit(folder, ran):
    status, out, _ = ran("audit", folder / "w.pt", "--model", f"{folder}/net.py:Net", "--partial", "--format", "json")
    assert status == 0
    assert json.loads(out)["model"]["partial"] is None


@pytest.mark.parametrize("prefixes", [("model.",), ("model.", "loss."), ("student.", "teacher.")])
def test_an_architecture_inside_a_larger_checkpoint(folder, ran, prefixes):
    weights = torch.load(folder / "w.pt")
    whole = {f"{prefix}{name}": tensor for prefix in prefixes for name, tensor in weights.items()}
    if "loss." in prefixes:
        whole = {name: tensor for name, tensor in whole.items() if name != "loss.out.bias"}
    torch.save(whole, folder / "whole.pt")
    status, _, err = ran("audit", folder / "whole.pt", "--model", f"{folder}/net.py:Net")
    if "teacher." in prefixes:
        assert status == 2
        assert "the architecture's weights are in it 2 times, under student., teacher.; save one of them" in err
    else:
        assert status == 0
        assert "the architecture's weights were found under 'model.'" in err
        assert ("left out: loss.hidden.weight" in err) == ("loss." in prefixes)
