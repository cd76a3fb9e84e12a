"""Fixtures of the gallery; those that write files are the loading tests'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.load.conftest import _one_thread, network, packed, saved, written  # noqa: F401 - fixtures


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that a successful attack creates."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


_MEASURE = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
import torch
from emscan.cli import app
torch.set_num_threads(1)

def run(arguments):
    try:
        app(arguments, standalone_mode=False)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)

def status(name):
    line = next(one for one in open("/proc/self/status") if one.startswith(name))
    return int(line.split()[1]) * 1024

warm, arguments = json.loads(sys.argv[1])
run(["audit", warm])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
run(arguments)
print("GROWN", status("VmHWM") - before)
"""


@pytest.fixture
def grows(tmp_path: Path) -> Callable[..., float]:
    """Return by how many MiB the memory of a process grows that runs a command, after it has audited a sound file."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process's memory can be reset on Linux only")

    def measure(*arguments: str, warm: dict[str, object] | None = None) -> float:
        sound = tmp_path / "sound" / ("config.json" if warm else "model.pt")
        sound.parent.mkdir(exist_ok=True)
        if warm:
            sound.write_text(json.dumps(warm))
        else:
            torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), sound)
        command = [sys.executable, "-c", _MEASURE, json.dumps([str(sound), list(arguments)])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split("GROWN ")[1]) / 2**20

    return measure
