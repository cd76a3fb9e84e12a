"""One thread for every probe test, and a way to say that the global generators must stay where they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@contextmanager
def _untouched() -> Iterator[None]:
    def state() -> Any:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest

    before = state()
    yield
    assert state() == before


@pytest.fixture
def untouched_generators() -> AbstractContextManager[None]:
    return _untouched()
