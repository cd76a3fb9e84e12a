"""Hostile safetensors headers and archives: one line, as the loader refuses them, whatever they claim."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emscan.errors import LoadError
from emscan.inspect import inspect
from tests.inspect.conftest import entry, header_of


def refusal(path: str) -> str:
    with pytest.raises(LoadError) as caught:
        inspect(path)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"cannot inspect {path}: ").removesuffix("; the file is damaged: copy or save it again")


CASES = [
    ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "'b' overlaps another"),
    ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, "'b' leaves bytes before it that belong to no tensor"),
    ({"a": entry("F32", [1], 4, 8)}, 8, "'a' leaves bytes before it that belong to no tensor"),
    ({"a": entry("F32", [2], 0, 4)}, 4, "'a' takes 8 bytes, its offsets say 4"),
    ({"a": entry("F32", [2], 8, 0)}, 8, "'a' takes 8 bytes, its offsets say -8"),
    ({"a": entry("F32", [-2], 0, 8)}, 8, "the shape or the offsets of 'a' are no sizes"),
    ({"a": entry("F32", [2.0], 0, 8)}, 8, "the shape or the offsets of 'a' are no sizes"),
    ({"a": entry("F32", [True], 0, 4)}, 4, "the shape or the offsets of 'a' are no sizes"),
    ({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}, 0, "'a' has an absurd shape"),
    ({"a": entry("U8", [2**40, 2**40], 0, 8)}, 8, "'a' has an absurd shape"),
    ({"a": entry("X9", [2], 0, 8)}, 8, "'a' has the unknown dtype 'X9'"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "KeyError"),
    ({"a": 3}, 8, "the value of 'a' at character 6 is not as it must be"),
    ({"a": {**entry("F32", [2], 0, 8), "x": {}}}, 8, "the value of 'a' at character 6 is not as it must be"),
    ({"__metadata__": {"a": 3}}, 0, "the value of '__metadata__' at character 17 is not as it must be"),
    ({"__metadata__": ["a"]}, 0, "the value of '__metadata__' at character 17 is not as it must be"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "size", "reason"), CASES)
def test_a_header_that_does_not_fit_its_file(raw, entries, size, reason):
    assert refusal(raw(json.dumps(entries), size)) == f"its header is malformed ({reason})"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "its header is malformed (it is no JSON at character 1)"),
        ('{"a":', "its header is malformed (the value of 'a' at character 5 is not as it must be)"),
        ('{"a":{}}x', "its header is malformed (KeyError)"),
        ("{}x", "its header is malformed (its JSON is followed by other characters)"),
        ('{"a":' + "[" * 100_000, "its header is malformed (the value of 'a' at character 5 is not as it must be)"),
        ('{"a":' + '{"b":' * 100_000, "its header is malformed (the value of 'a' at character 5 is not as it must be)"),
        (b'{"\xff":1}', "its header is malformed (UnicodeDecodeError)"),
    ],
)
def test_a_header_that_is_no_json(raw, text, reason):
    assert refusal(raw(text)) == reason


def test_a_key_that_comes_twice(raw):
    one = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    assert refusal(raw(f"{{{one},{one}}}", 1)) == "its header is malformed (the key 'a' comes twice)"
    twice = '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert refusal(raw(twice, 1)) == "its header is malformed (a key comes twice)"
    metadata = '{"__metadata__":{"x":"1","x":"2"}}'
    assert refusal(raw(metadata)) == "its header is malformed (a key comes twice)"


def test_sizes_that_are_not_there(written, raw):
    huge = (2**40).to_bytes(8, "little") + b"{" + bytes(20)
    assert refusal(written(huge)).startswith("its header claims 1,099,511,627,776 bytes, more than the file has")
    longer = (1000).to_bytes(8, "little") + b"{" + bytes(20)
    assert refusal(written(longer)) == "its header claims 1,000 bytes, more than the file has"
    cut = raw(json.dumps({"a": entry("F32", [2], 0, 8)}), 7)
    assert refusal(cut) == "its tensors need 1 bytes more than the file has"
    more = raw(json.dumps({"a": entry("F32", [2], 0, 8)}), 9)
    assert refusal(more) == "its last 1 bytes belong to no tensor"


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_library_refuses_these_as_well(raw, case):
    entries, size, _ = CASES[case]
    path = raw(json.dumps(entries), size)
    if case == 13:  # a field that the library does not know: it takes the file, emscan is stricter
        return
    with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever type it is
        safetensors.torch.load_file(path)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(["F32", "BF16", "I8", "F64"]), st.lists(st.integers(0, 4), max_size=3)), max_size=6),
    names=st.lists(st.text(max_size=6), min_size=6, max_size=6, unique=True),
    spaces=st.integers(0, 9),
)  # fmt: skip
def test_what_the_library_writes_is_read(tmp_path_factory, sizes, names, spaces):
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "F64": torch.float64}
    names = [name for name in names if name != "__metadata__"]
    tensors = {name: torch.zeros(shape, dtype=dtypes[kind]) for name, (kind, shape) in zip(names, sizes, strict=False)}
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    safetensors.torch.save_file(tensors, path, {"a": "\n" * spaces, '"': "\\{}"})
    found = inspect(str(path))
    assert {one.name: one.shape for one in found.tensors} == {name: [*t.shape] for name, t in tensors.items()}
    assert found.metadata == {"a": "\n" * spaces, '"': "\\{}"}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_byte_never_escapes(tmp_path_factory, data):
    """The file is read, or refused in one line: whatever byte of a header changes."""
    whole = bytearray(header_of({"a": entry("F32", [2], 0, 8), "b": entry("BF16", [2, 2], 8, 16)}) + bytes(16))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    path.write_bytes(whole)
    with contextlib.suppress(LoadError):
        inspect(str(path), check_values=True)


def test_archives_are_checked_as_the_loader_checks_them(saved, tmp_path):
    path = saved({"w": torch.ones(2)})
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for info in before.infolist():
            after.writestr(info.filename, before.read(info))
    with pytest.raises(LoadError, match=r"its zip entry .* is compressed, which torch\.save never does"):
        inspect(str(packed))


def test_a_file_that_is_cut_short(saved):
    path = Path(saved({"w": torch.ones(2)}))
    path.write_bytes(path.read_bytes()[:500])
    assert refusal(str(path)).startswith("it is a zip archive that is cut short or damaged")
