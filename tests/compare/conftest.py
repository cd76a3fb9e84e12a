from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.runs import train


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that Lightning would have written: units of both hidden layers die, some revive."""
    folder = tmp_path_factory.mktemp("run")
    train(folder / "lightning_logs" / "version_0" / "checkpoints")
    return folder


@pytest.fixture(scope="session")
def checkpoints(run_folder: Path) -> list[Path]:
    """In the order of training."""
    found = (run_folder / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
    return sorted(found, key=lambda path: int(path.stem.rpartition("=")[2]))
