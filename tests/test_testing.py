"""The assertions for users' own tests: what they say when they fail, in a real run of pytest too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from emscan.errors import UsageError
from emscan.testing import assert_alive, assert_no_findings


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias[[2, 5]] = -100.0
    return model


def probe() -> torch.Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def test_a_failure_names_layers_and_units() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_alive(net(), probe(), max_dead="5%")
    assert str(failed.value) == (
        "1 layer is not within max-dead = 5%, on a probe of 64 samples:\n"
        "  EM501 layer 0: 2 of 8 units are dead, 25%; max-dead allows 5%\n"
        "    indices: 2, 5"
    )


def test_what_is_within_passes_and_gives_the_report() -> None:
    report = assert_alive(net(), probe(), max_dead=2, max_starved=3)
    assert report.layers[0].components is not None
    assert report.layers[0].components.dead == [2, 5]
    assert_alive(net(), probe(), layers=["2"])
    assert_alive(net(), (probe(),), max_dead="25%", max_dead_model="15%", min_entropy=0)


def test_a_failure_of_the_whole_model_names_units_as_well() -> None:
    with pytest.raises(AssertionError, match=r"(?s)2 of 14 components are dead.*layer 0, indices: 2, 5"):
        assert_alive(net(), probe(), max_dead="off", max_dead_model=1)


def test_nothing_to_look_at_is_no_success() -> None:
    with pytest.raises(AssertionError, match=r"layers=encoder.*: no such layer has components; the layers are 0, 2"):
        assert_alive(net(), probe(), layers="encoder.*")


def test_wrong_limits() -> None:
    with pytest.raises(UsageError, match="no limit max_ded; did you mean max_dead"):
        assert_alive(net(), probe(), max_ded=1)
    with pytest.raises(UsageError, match=r"max_dead=0\.5; write a share"):
        assert_alive(net(), probe(), max_dead=0.5)  # type: ignore[arg-type]


def test_findings() -> None:
    with pytest.raises(AssertionError, match=r"(?s)^1 finding, .*EM101 layer 0: 2 of 8 .*indices: 2, 5"):
        assert_no_findings(net(), probe())
    assert_no_findings(net(), probe(), ignore="dead-unit")
    assert_no_findings(net(), probe(), select=["EM2"])
    assert_no_findings(net(), probe(), fail_on="error")


def test_in_a_run_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from emscan.testing import assert_alive\n"
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "with torch.no_grad():\n"
        "    model[0].bias.fill_(1.0)\n"
        "    model[0].bias[3] = -100.0\n"
        "def test_alive():\n"
        "    assert_alive(model, torch.randn(32, 4), max_dead=0)\n"
        "def test_some():\n"
        "    assert_alive(model, torch.randn(32, 4), max_dead=4)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_net.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "1 failed, 1 passed" in ran.stdout
    assert "EM501 layer 0: 1 of 8 units are dead, 12.5%; max-dead allows 0" in ran.stdout
    assert "  indices: 3\n" in ran.stdout
    assert ">       assert_alive(model, torch.randn(32, 4), max_dead=0)" in ran.stdout
    assert "emscan/testing.py" not in ran.stdout  # the line that is shown is the test's


def test_it_needs_no_pytest_and_no_torch_to_import() -> None:
    code = "import sys, emscan.testing; print('pytest' in sys.modules, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False False"
