"""`emscan init`: the policy it writes is read again, and passes on the model that it was begun from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.cli.inprocess import Emscan, emscan

__all__ = ["emscan"]

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
PROBE = FIXTURES / "digits.safetensors"
NETS = FIXTURES / "models.py"
CASES = {
    "relu": ("relu_mlp.pt", ["--probe", PROBE]),
    "synthetic": ("relu_mlp.pt", []),
    "conv": ("conv.safetensors", ["--model", f"{NETS}:ConvNet", "--probe", FIXTURES / "digits_images.safetensors"]),
    "router": ("experts.safetensors", ["--model", f"{NETS}:MixtureOfExperts", "--probe", PROBE]),
    "collapsed": (
        "implicit_em_collapsed.pt",
        ["--model", f"{NETS}:ImplicitEM", "--probe", FIXTURES / "digits_unlabeled.safetensors"],
    ),
    "tanh": ("tanh_mlp.pt", ["--model", f"{NETS}:tanh_mlp", "--probe", PROBE]),
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository to work in."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("where", ["emscan.toml", "pyproject.toml"])
def test_a_check_right_after_passes(emscan: Emscan, name: str, where: str) -> None:
    file, options = CASES[name]
    shared = ["--pyproject"] if where == "pyproject.toml" else []
    made = emscan("init", FIXTURES / file, *options, *shared)
    assert (made.status, made.out) == (0, "")
    assert f"emscan: wrote {where}" in made.err
    ran = emscan("check", FIXTURES / file)
    assert ran.status == 0, ran.out
    assert not ran.err  # nothing in it is stale
    stricter = emscan("check", FIXTURES / file, "--max-dead", "0", "--max-starved", "0")
    assert stricter.status == (0 if name == "tanh" else 1)


def test_limits_are_what_the_model_shows_rounded_up(emscan: Emscan) -> None:
    emscan("init", FIXTURES / "relu_mlp.pt", "--probe", PROBE)
    found = tomllib.loads(Path("emscan.toml").read_text())
    assert found["max-dead"] == 0
    assert {table["pattern"]: table["max-dead"] for table in found["layer"]} == {"0": "25%", "2": "17%", "4": "29%"}
    assert found["probe"] == str(PROBE)


def test_a_collapse_is_not_made_the_aim(emscan: Emscan) -> None:
    file, options = CASES["collapsed"]
    emscan("init", FIXTURES / file, *options)
    text = Path("emscan.toml").read_text()
    assert "min-information" not in text
    assert tomllib.loads(text)["layer"] == [{"pattern": "encoder", "max-dead": "72%", "ignore": ["EM201"]}]
    assert "suppressed only" in emscan("check", FIXTURES / file).out


def test_nothing_is_overwritten(emscan: Emscan) -> None:
    Path("emscan.toml").write_text("seed = 1\n")
    ran = emscan("init")
    assert ran.status == 2
    assert ran.err == "emscan: error: emscan.toml is there already; edit it, or replace it with --force\n"
    assert emscan("init", "--force").status == 0
    assert Path("emscan.toml").read_text() != "seed = 1\n"


def test_pyproject_is_only_appended_to(emscan: Emscan) -> None:
    before = '[project]\nname = "x"  # a comment\n'
    Path("pyproject.toml").write_text(before)
    assert emscan("init", "--pyproject").status == 0
    after = Path("pyproject.toml").read_text()
    assert after.startswith(before)
    assert tomllib.loads(after)["tool"]["emscan"] == {"fail-on": ["warning"]}
    assert emscan("init", "--pyproject", "--force").status == 2
    assert Path("pyproject.toml").read_text() == after
    Path("pyproject.toml").write_text("a = [\n")
    assert "no TOML" in emscan("init", "--pyproject").err


def test_a_model_that_cannot_be_audited_leaves_nothing(emscan: Emscan) -> None:
    assert emscan("init", "gone.pt").status == 2
    assert not Path("emscan.toml").exists()
