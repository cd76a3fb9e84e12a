"""Random changes of small files: a model, or one line that says why not."""

from __future__ import annotations

import io
import random
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from emscan.errors import LoadError
from emscan.load import LoadedModel, load


def originals() -> dict[str, bytes]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LSTM(3, 2))
    files = {"safetensors": safetensors.torch.save(module.state_dict())}
    for name, value, zipped in (
        ("module", module, True),
        ("state", module.state_dict(), True),
        ("old", module.state_dict(), False),
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        files[name] = buffer.getvalue()
    return files


ORIGINALS = originals()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(ORIGINALS)), st.integers(0, 2**32 - 1), st.integers(1, 8), st.booleans())
def test_mutations_give_a_model_or_a_load_error(tmp_path, kind, seed, count, cut):
    chooser = random.Random(seed)
    data = bytearray(ORIGINALS[kind])
    for _ in range(count):
        data[chooser.randrange(len(data))] = chooser.randrange(256)
    path = tmp_path / "mutant.pt"
    path.write_bytes(data[: chooser.randrange(len(data))] if cut else data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = str(path)
        try:
            assert isinstance(load(str(path)), LoadedModel)
        except LoadError as error:
            message = str(error)
    assert str(path) in message
    assert "\n" not in message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", bytes([40, *[0] * 7, 123])])
)
def test_random_bytes_give_a_load_error(tmp_path, tail, head):
    path = tmp_path / "random.bin"
    path.write_bytes(head + tail)
    with pytest.raises(LoadError):
        load(str(path))
