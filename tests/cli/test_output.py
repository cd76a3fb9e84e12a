"""Where the report goes, and what happens to it when readers, terminals, files or the model's code misbehave."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emscan.cli.output import check_output, emit, write_file
from emscan.errors import UsageError
from tests.cli.test_audit_command import MODEL, PROBE, ROOT, emscan, failed

NETS = """
import os, sys, time
from torch import nn

class Linear(nn.Linear):
    def __init__(self):
        super().__init__(64, 3)

class Exits(Linear):
    def forward(self, x):
        sys.exit(0)

class Writes(Linear):
    def forward(self, x):
        os.write(1, b"hello")
        return super().forward(x)

class Slow(Linear):
    def forward(self, x):
        print("running", flush=True)
        time.sleep(0.3)
        return super().forward(x)
"""


@pytest.fixture
def audit_of(tmp_path: Path):
    """Return the arguments that audit a class of NETS."""
    (tmp_path / "nets.py").write_text(NETS)
    save_file({"weight": torch.zeros(3, 64), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")

    def arguments(name: str) -> list[str]:
        target = f"{tmp_path}/nets.py:{name}"
        return ["audit", str(tmp_path / "w.safetensors"), "--model", target, "--probe", PROBE, "--format", "json"]

    return arguments


def test_a_model_that_calls_exit_is_a_failure(audit_of) -> None:
    """Exit status 0 and an empty report would pass for a clean audit."""
    assert "exit(0)" in failed(emscan(*audit_of("Exits")))


def test_stdout_is_the_reports_even_for_code_below_python(audit_of) -> None:
    ran = emscan(*audit_of("Writes"))
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["summary"]["layers"] == 1
    assert "hello" in ran.stderr


def test_an_interrupt_is_one_line(audit_of) -> None:
    command = [sys.executable, "-m", "emscan", *audit_of("Slow"), "--batch-size", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert run.stderr.readline() == "running\n"
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert not out
    assert [line for line in err.splitlines() if line != "running"] == ["emscan: interrupted"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_leaves_the_report_on_stdout(audit_of) -> None:
    """The bar starts while the model's prints are redirected; it must not hand that redirection back as stdout."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "emscan", *audit_of("Slow"), "--batch-size", "64"]
    environment = {**os.environ, "TERM": "xterm"}
    shown: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                shown.append(piece)
        except OSError:  # the other side has closed
            return

    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs) as run:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        out, _ = run.communicate(timeout=120)
        reader.join()
    os.close(ours)
    assert run.returncode == 0
    assert json.loads(out)["probe"]["samples"] == 450
    assert b"samples/s" in b"".join(shown)


@pytest.mark.parametrize("command", [("schema",), ("audit", MODEL, "--probe", PROBE, "--format", "json")])
def test_a_reader_that_has_gone_is_no_finding(command: tuple[str, ...]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "emscan", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.stderr is not None
        err = run.stderr.read()
    assert run.returncode == 0
    assert not err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "emscan", "schema"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "cannot write to stdout" in ran.stderr


def test_a_terminal_without_unicode_gets_the_table() -> None:
    ran = emscan("audit", MODEL, "--probe", PROBE, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0
    assert "-----" in ran.stdout
    assert "Linear + Softmax + Cross-Entropy" in ran.stdout


def test_what_cannot_be_encoded_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    emit("─ … \udc80 é")
    stream.seek(0)
    assert stream.read() == "- ~ \\udc80 \\xe9\n"


def test_debugging_shows_the_traceback_and_keeps_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An uncaught exception exits 1, which would look like findings."""
    from emscan import cli, pipeline

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("\x1b[31mred")

    monkeypatch.setenv("EMSCAN_DEBUG", "1")
    monkeypatch.setattr(pipeline, "run", broken)
    monkeypatch.setattr(sys, "argv", ["emscan", "audit", MODEL, "--probe", PROBE])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("emscan: internal error: RuntimeError: \\x1b[31mred")


def test_output_refuses_folders_and_what_it_audits(tmp_path: Path) -> None:
    assert "a folder" in failed(emscan("audit", MODEL, "--output", tmp_path))
    copy = tmp_path / "model.pt"
    copy.write_bytes(Path(MODEL).read_bytes())
    with pytest.raises(UsageError, match="replace what is audited"):
        check_output(copy, str(tmp_path / "." / "model.pt"), "random:normal")
    check_output(tmp_path / "new.json", str(copy), None)


def test_a_link_stays_a_link_and_modes_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_file(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name != "posix", reason="devices")
def test_a_device_is_written_to_and_not_replaced() -> None:
    write_file(Path("/dev/null"), "report")
    assert Path("/dev/null").is_char_device()


def test_what_fails_to_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    target.write_text("kept")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UsageError, match="No space left"):
        write_file(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text() == "kept"


def test_the_options_name_every_format() -> None:
    from emscan.cli.writing import FORMAT_NAMES
    from emscan.report.formats import FORMATS

    assert tuple(FORMATS) == FORMAT_NAMES
