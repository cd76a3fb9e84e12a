"""NaN and Inf: the counts of torch, for every dtype and every way in which a tensor lies in its storage."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emscan.errors import LoadError
from emscan.inspect import inspect, values

FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def expected(tensor: torch.Tensor) -> tuple[int, int]:
    wide = tensor if tensor.is_complex() else tensor.to(torch.float64)
    return int(wide.isnan().sum()), int(wide.isinf().sum())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_of_a_dtype(saved, dtype):
    size = dtype.itemsize
    if size <= 2:
        codes = torch.arange(256 ** (3 - size), dtype=torch.int64).to(torch.uint8 if size == 1 else torch.int16)
        codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16) if size == 2 else codes
        tensor = codes.view(dtype)
    else:
        tensor = torch.tensor([0.0, 1.0, float("nan"), float("inf"), -float("inf"), -float("nan"), 1e30], dtype=dtype)
    (found,) = inspect(saved({"w": tensor}), check_values=True).tensors
    assert (found.nan, found.inf) == expected(tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_elements(saved, dtype):
    tensor = torch.tensor(
        [complex("nan"), complex(1, float("inf")), 1j, complex(float("nan"), float("nan"))], dtype=dtype
    )
    (found,) = inspect(saved({"w": tensor}), check_values=True).tensors
    assert (found.nan, found.inf) == (2, 1)


def test_integers_have_neither(saved):
    tensors = {str(dtype): torch.full((3,), 1, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.uint8)}
    assert {(one.nan, one.inf) for one in inspect(saved(tensors), check_values=True).tensors} == {(0, 0)}


@pytest.mark.parametrize("block", [8, 64, 1 << 24])
def test_views_count_only_what_they_show(saved, monkeypatch, block):
    monkeypatch.setattr(values, "_BLOCK", block)
    base = torch.arange(4000.0)
    base[::7] = float("nan")
    base[::11] = float("inf")
    views = {
        "slice": base[100:2000], "step": base[::7], "rows": base.view(40, 100)[:, 3:5], "columns": base.view(40, 100).T,
        "windows": base[:100].unfold(0, 20, 1), "wide": base[:3000].as_strided((10, 300), (4, 1)),
        "expanded": base[7:8].expand(5, 6), "scalar": base[7], "empty": base[:0], "one": base[11:12],
        "cube": base.view(10, 20, 20).permute(2, 0, 1)[1::3],
    }  # fmt: skip
    found = {one.name: (one.nan, one.inf) for one in inspect(saved(views), check_values=True).tensors}
    assert found == {name: expected(view) for name, view in views.items()}


@settings(max_examples=100, deadline=None)
@given(
    axes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4),
    offset=st.integers(0, 5),
    block=st.sampled_from([4, 40, 400]),
)
def test_any_strides(tmp_path_factory, axes, offset, block):
    base = torch.arange(200.0)
    base[::3] = float("nan")
    base[::4] = float("inf")
    tensor = base.as_strided([size for size, _ in axes], [stride for _, stride in axes], offset)
    path = tmp_path_factory.mktemp("v") / "v.pt"
    torch.save({"w": tensor}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "_BLOCK", block)
        (found,) = inspect(str(path), check_values=True).tensors
    assert (found.nan, found.inf) == expected(tensor)


def test_safetensors_and_legacy_files(tmp_path, saved):
    tensors = {"a": torch.tensor([float("nan"), 1]), "b": torch.tensor([[float("inf")]] * 3, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.safetensors", saved(tensors, _use_new_zipfile_serialization=False)):
        assert {one.name: (one.nan, one.inf) for one in inspect(str(path), check_values=True).tensors} == {
            "a": (1, 0), "b": (0, 3),
        }  # fmt: skip


def test_big_endian_files(tmp_path, packed):
    from tests.hostile.helpers import one, tensor

    path = packed(
        one(tensor(b"K\x02\x85", b"K\x01\x85")),
        {"data/0": struct.pack(">4f", float("nan"), 1, 2, 3), "byteorder": b"big"},
    )
    (found,) = inspect(path, check_values=True).tensors
    assert (found.nan, found.inf) == (1, 0)


def test_memory_is_bounded(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(60_000_000)}, path)
    tracemalloc.start()
    try:
        (found,) = inspect(str(path), check_values=True).tensors
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.nan, found.inf) == (0, 0)
    assert peak < 120_000_000  # bytes; the tensor has 240 million


def test_views_that_repeat_a_file_too_often(saved):
    base = torch.zeros(4_000_000)
    path = saved({f"w{i}": base[i:] for i in range(20)})
    with pytest.raises(
        LoadError, match="its tensors repeat far less data, too often to count in; leave --check-values out"
    ):
        inspect(path, check_values=True)
    assert inspect(path).totals.tensors == 20
