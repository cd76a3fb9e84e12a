"""Files for the loading tests, written on the spot; nothing hostile is kept in the repository."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    ).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def save(value: object, name: str = "model.pt", **options: object) -> str:
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(value, path, **options)
        return str(path)

    return save


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(data: bytes | str, name: str = "model.pt") -> str:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


@pytest.fixture
def packed(written: Callable[..., str]) -> Callable[..., str]:
    """Write a torch archive around a pickle of one's own."""

    def pack(pickled: bytes, records: dict[str, bytes] | None = None, name: str = "model.pt", **options: int) -> str:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", **options) as archive:
            entries = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(records or {})}
            for entry, data in entries.items():
                archive.writestr(f"archive/{entry}", data)
        return written(buffer.getvalue(), name)

    return pack
