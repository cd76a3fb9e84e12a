"""The command line without a new process: an interpreter with torch takes seconds to start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest

from emscan.cli import main


@dataclass
class Ran:
    """What a command came to."""

    status: int
    out: str
    err: str


Emscan = Callable[..., Ran]


@pytest.fixture
def emscan(capfd: pytest.CaptureFixture[str]) -> Emscan:
    """Run emscan with some arguments, and keyword arguments as environment, in the working directory."""

    def run(*arguments: object, **environment: str) -> Ran:
        capfd.readouterr()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("EMSCAN_", "GITHUB_", "CI_"))}
        argv = ["emscan", *map(str, arguments)]
        with (
            mock.patch.dict(os.environ, {**clean, "COLUMNS": "100", **environment}, clear=True),
            mock.patch.object(sys, "argv", argv),
            pytest.raises(SystemExit) as stop,
        ):
            main()
        out, err = capfd.readouterr()
        return Ran(int(stop.value.code or 0), out, err)

    return run
