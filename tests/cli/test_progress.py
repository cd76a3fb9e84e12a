"""Progress: what it says, and that only a terminal gets it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from emscan.cli.progress import described

_SLOW = """
import time
import torch


class Batches:
    def __iter__(self):
        for _ in range(8):
            time.sleep(0.4)
            yield torch.randn(50, 4)
{length}


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
"""
_LENGTH = "    def __len__(self):\n        return 8\n"


@pytest.mark.parametrize(
    ("done", "total", "samples", "seconds", "text"),
    [
        (0, 10, 0, 1.0, ""),
        (1, None, 64, 0.0, ""),
        (4, 10, 4000, 2.0, "2,000 samples/s, 0:03 left"),
        (4, None, 4000, 2.0, "2,000 samples/s"),
        (1, 500, 8, 10.0, "0.8 samples/s, 1:23:10 left"),
        (10, 10, 4000, 2.0, "2,000 samples/s"),
    ],
)
def test_described(done: int, total: int | None, samples: int, seconds: float, text: str) -> None:
    assert described(done, total, samples, seconds) == text


def seen_on_a_terminal(folder: Path, length: str) -> str:
    (folder / "slow.py").write_text(_SLOW.format(length=length))
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import slow, torch; "
    code += f"torch.save(slow.net().state_dict(), {str(folder / 'w.pt')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "emscan", "audit", str(folder / "w.pt"), "--model", f"{folder}/slow.py:net"]
    command += ["--probe", f"{folder}/slow.py:Batches"]
    main, side = pty.openpty()
    ran = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=side, text=True, env={**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    )
    os.close(side)
    read = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        read += part
    out, _ = ran.communicate(timeout=60)
    os.close(main)
    assert ran.returncode == 0
    assert out.count("samples/s") == 0
    return read.decode(errors="replace")


def test_a_terminal_sees_batches_rate_and_remaining_time(tmp_path: Path) -> None:
    shown = seen_on_a_terminal(tmp_path, _LENGTH)
    assert "/8" in shown
    assert "samples/s" in shown
    assert " left" in shown


def test_without_a_length_there_is_a_rate_and_no_remaining_time(tmp_path: Path) -> None:
    shown = seen_on_a_terminal(tmp_path, "")
    assert "/?" in shown
    assert "samples/s" in shown
    assert " left" not in shown
