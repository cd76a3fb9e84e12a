"""Tensors in a pickle whose claims the file does not keep."""

from __future__ import annotations

import struct

import pytest

from emscan.load import load
from tests.hostile.helpers import HUGE, LINEAR, glob, legacy, legacy_tensor, one, refusal, tensor


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (tensor(b"K\x05\x85", b"K\x01\x85"), "it has a tensor that reaches beyond its data"),
        (tensor(b"K\x02\x85", b"K\x04\x85"), "it has a tensor that reaches beyond its data"),
        (tensor(b"K\x01\x85", b"K\x01\x85", offset=b"K\x04"), "it has a tensor that reaches beyond its data"),
        (tensor(b"K\x01\x85", b"K\x01\x85", offset=HUGE), "it has a tensor that reaches beyond its data"),
        (
            tensor(b"K\x05\x85", b"K\x01\x85", count=b"K\x05"),
            "its record data/0 holds fewer bytes than a tensor claims",
        ),
        (tensor(HUGE + b"\x85", b"K\x01\x85", count=HUGE), "its record data/0 holds fewer bytes than a tensor claims"),
        (tensor(HUGE + b"\x85", b"K\x00\x85"), f"it has a tensor of shape ({2**44},) that repeats far less data"),
        (tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "it has a tensor whose shape is no short tuple of sizes"),
        (tensor(b"]", b"K\x01\x85"), "it has a tensor whose shape is no short tuple of sizes"),
        (tensor(b"K\x04\x85", b")"), "it would rebuild a tensor from something that is no tensor's data"),
        (tensor(b"K\x04\x85", b"K\x01\x85", hooks=b"}K\x01K\x02s"), "it stores hooks on a tensor, which would run"),
        (tensor(b"K\x04\x85", b"K\x01\x85", hooks=b"}q\x09") + b"\x30h\x09K\x01K\x02s", "its pickle uses opcode 0x30"),
    ],
)
def test_tensors_must_fit_their_data(packed, value, reason):
    assert refusal(packed(one(value), {"data/0": bytes(16)})).startswith(reason)


def test_the_handmade_tensor_is_fine_when_it_fits(packed):
    path = packed(one(tensor(b"K\x02K\x02\x86", b"K\x02K\x01\x86")), {"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert load(path).weights["w"].tolist() == [[1, 2], [3, 4]]


def test_hooks_that_are_filled_later(packed):
    hooks = b"}q\x09"
    later = b"\x80\x02(" + tensor(b"K\x04\x85", b"K\x01\x85", hooks=hooks) + b"h\x09K\x01K\x02s" + b"t."
    assert refusal(packed(later, {"data/0": bytes(16)})).startswith("it stores hooks on a tensor")


@pytest.mark.parametrize(
    ("body", "keys", "data", "reason"),
    [
        (legacy_tensor(HUGE), b"]X\x01\x00\x00\x000a", bytes(24), "its tensors claim more data than the file has"),
        (legacy_tensor(b"K\x04"), b"]", bytes(24), "its list of storages is not the one that its tensors use"),
        (legacy_tensor(b"K\x04"), b"]K\x00a", bytes(24), "its list of storages is not the one that its tensors use"),
        (legacy_tensor(b"K\x04"), b"]X\x01\x00\x00\x000a", bytes(24), "its tensors claim more data than the file has"),
        (
            legacy_tensor(b"K\x04"),
            b"]X\x01\x00\x00\x000a",
            struct.pack("<q", 4) + bytes(15),
            "its tensors claim more data than the file has",
        ),
    ],
)
def test_legacy_storages_must_be_there(written, body, keys, data, reason):
    assert refusal(written(legacy(body, keys, data))).startswith(reason)


def test_the_handmade_legacy_file_is_fine_when_it_fits(written):
    data = struct.pack("<q4f", 4, 7, 0, 0, 0)
    path = written(legacy(legacy_tensor(b"K\x04"), b"]X\x01\x00\x00\x000a", data))
    assert load(path).weights["w"].tolist() == [7]


def test_nothing_is_allocated_that_the_file_does_not_hold(packed):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    body = glob(LINEAR) + b"J\x00\x00\x01\x00J\x00\x00\x01\x00\x86R"  # 2**32 weights
    refusal(packed(b"\x80\x02" + body + b"."))
    refusal(packed(one(tensor(HUGE + b"\x85", b"K\x01\x85", count=HUGE)), {"data/0": bytes(16)}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
