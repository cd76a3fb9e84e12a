"""Interrupting an audit: what was measured so far is printed, marked partial; a second time quits at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import emscan
from emscan.report.schema import schema

_NET = """
import time
import torch
from pathlib import Path
from torch import nn

HERE = Path(__file__).parent


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        slow = HERE / "slow"
        if slow.exists():
            (HERE / "inside").touch()
            time.sleep(float(slow.read_text()))
        return self.b(torch.relu(self.a(x))).softmax(-1)


def batches():
    generator = torch.Generator().manual_seed(0)
    stop = int((HERE / "stop").read_text())
    for number in range(1000):
        if number == 5 and (HERE / "asked").exists():
            (HERE / "asked").rename(HERE / "slow")  # this batch takes long
        if number == stop:
            (HERE / "reached").touch()
            time.sleep(60)
        yield torch.randn(10, 4, generator=generator)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)})
    with torch.no_grad():
        net["a"].bias[2] = -100.0  # one dead unit
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "net.py").write_text(_NET)
    (tmp_path / "stop").write_text("5")
    return tmp_path


def start(folder: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "emscan", "audit", folder / "w.safetensors", "--model", f"{folder}/net.py:Net"]
    command += ["--probe", f"{folder}/net.py:batches", *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if path.exists():
            return
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def interrupted(folder: Path, *options: object, by: int = signal.SIGINT) -> tuple[str, str, int]:
    running = start(folder, *options)
    wait_for(folder / "reached", running)
    running.send_signal(by)
    out, err = running.communicate(timeout=60)
    return out, err, running.returncode


def alike(a: Any, b: Any) -> bool:
    """Whether two documents hold the same, numbers to rounding: threads change the order of sums."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-6, abs=1e-9)
    return a == b


def whole(folder: Path, batches: int) -> emscan.Report:
    """What an audit of the first batches says."""
    sys.path.insert(0, str(folder))
    try:
        import importlib.util

        spec = importlib.util.spec_from_file_location("_net_of_interrupt", folder / "net.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    from safetensors.torch import load_file

    net = module.Net()
    net.load_state_dict(load_file(folder / "w.safetensors"))

    def some() -> Iterator[torch.Tensor]:
        for _, x in zip(range(batches), module.batches(), strict=False):
            yield x

    return emscan.audit(net.eval(), some())


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_report_of_what_was_done_is_written(folder: Path, by: int, code: int) -> None:
    out, err, status = interrupted(folder, "--format", "json", by=by)
    assert status == code
    assert err.splitlines()[-1] == "emscan: interrupted: the report is partial, of 50 samples in 5 batches"
    document = json.loads(out)
    jsonschema.Draft202012Validator(schema()).validate(document)
    assert document["probe"]["partial"] is True
    assert (document["probe"]["samples"], document["probe"]["batches"]) == (50, 5)
    assert [f["rule"] for f in document["findings"] if f["rule"] == "EM904"] == ["EM904"]
    expected = whole(folder, 5).to_dict()
    assert not expected["probe"]["partial"]
    for row, other in zip(document["layers"], expected["layers"], strict=True):
        assert alike(row["components"], other["components"])
        assert alike(row["responsibility"], other["responsibility"])
    assert document["layers"][0]["components"]["dead"] == [2]


def test_the_table_says_that_it_is_partial(folder: Path) -> None:
    out, _, status = interrupted(folder)
    assert status == 130
    assert "PARTIAL: interrupted after 5 batches (50 samples); all numbers are of these alone." in out
    assert "EM904 note" in out


def test_the_output_file_is_written(folder: Path) -> None:
    out, err, status = interrupted(folder, "--format", "json", "--output", folder / "report.json")
    assert (out, status) == ("", 130)
    assert json.loads((folder / "report.json").read_text())["probe"]["batches"] == 5
    assert "Traceback" not in err


def test_before_the_first_batch_there_is_nothing_to_report(folder: Path) -> None:
    (folder / "stop").write_text("0")
    out, err, status = interrupted(folder, "--output", folder / "report.json")
    assert (out, err, status) == ("", "emscan: interrupted\n", 130)
    assert not (folder / "report.json").exists()


def test_a_batch_that_runs_is_finished_first(folder: Path) -> None:
    (folder / "stop").write_text("900")
    (folder / "asked").write_text("2")
    running = start(folder, "--format", "json")
    wait_for(folder / "inside", running)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    document = json.loads(out)
    assert (document["probe"]["samples"], document["probe"]["batches"]) == (60, 6)
    (softmax,) = (row for row in document["layers"] if row["mechanism"] == "softmax")
    assert softmax["responsibility"]["competitions"] == 60  # no batch is in it by half
    assert "emscan: interrupted: finishing this batch (again to quit at once)" in err


def test_a_second_time_quits_at_once(folder: Path) -> None:
    (folder / "stop").write_text("900")
    (folder / "asked").write_text("300")
    running = start(folder, "--format", "json")
    wait_for(folder / "inside", running)
    running.send_signal(signal.SIGINT)
    time.sleep(1)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (out, running.returncode) == ("", 130)
    assert err.splitlines()[-1] == "emscan: interrupted"


def test_from_python_the_exception_carries_the_report() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def batches() -> Iterator[torch.Tensor]:
        yield from torch.randn(3, 10, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        emscan.audit(net, batches())
    report = stopped.value.report
    assert report.probe.partial
    assert (report.probe.samples, report.probe.batches) == (30, 3)
    assert report.layers[0].components.on_rate is not None
    assert "PARTIAL" in str(report)
    assert "PARTIAL" in report._repr_html_()
    jsonschema.Draft202012Validator(schema()).validate(report.to_dict())
    assert net.training


def test_from_python_nothing_is_carried_before_the_first_batch() -> None:
    def batches() -> Iterator[torch.Tensor]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt) as stopped:
        emscan.audit(nn.Linear(4, 6), batches())
    assert not hasattr(stopped.value, "report")
