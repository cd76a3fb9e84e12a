"""The bytes that are checked are the bytes that are loaded, and memory grows by what the file justifies."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from emscan.load import format_checkpoint, load, loading
from tests.hostile.helpers import HUGE, LINEAR, Call, command, glob, one, refusal, tensor


def test_a_file_that_is_exchanged_between_check_and_load(saved, packed, canary, monkeypatch):
    """The attack needs a second reading of the path; there is none."""
    path = saved(nn.Sequential(nn.Linear(2, 2)).state_dict())
    evil = Path(packed(pickle.dumps(Call(os.system, f"touch {canary}"), 2), name="evil.pt")).read_bytes()
    check = format_checkpoint.check

    def exchange(*arguments, **options):
        found = check(*arguments, **options)
        Path(path).write_bytes(evil)
        return found

    monkeypatch.setattr(format_checkpoint, "check", exchange)
    assert set(load(path).weights or {}) == {"0.weight", "0.bias"}  # what was checked


def test_a_file_that_changes_between_its_head_and_its_data(saved, monkeypatch):
    path = saved({"w": torch.ones(2**16)})  # more than the head that tells the format
    detect = loading.detect

    def exchange(source, *rest):
        found = detect(source, *rest)
        Path(path).write_bytes(b"\x80\x02cos\nsystem\n.")
        return found

    monkeypatch.setattr(loading, "detect", exchange)
    assert refusal(path) == "it changed while it was read; try again when nothing writes to it"


def test_a_pipe_does_not_wait_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "m.pt")
    assert refusal(str(tmp_path / "m.pt")) == "it is no regular file; give the path of a model file"
    assert refusal("/dev/zero") == "it is no regular file; give the path of a model file"


def test_a_refused_file_is_not_tried_again(packed, canary, monkeypatch):
    """No second loader, and torch's own is never asked for more than weights."""
    asked = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k.get("weights_only")) or original(*a, **k))
    refusal(packed(pickle.dumps(Call(os.system, f"touch {canary}"), 2)))
    assert asked == []
    load(packed(one(tensor(b"K\x02\x85", b"K\x01\x85")), {"data/0": bytes(16)}))
    assert asked == [True]


def test_trust_is_in_the_report(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, and its files are about
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).save(tmp_path / "m.pt")
    assert command("audit", str(tmp_path / "m.pt"))[0] == 2
    status, out, _ = command("audit", str(tmp_path / "m.pt"), "--trust", "--format", "json")
    assert status in (0, 3)
    assert json.loads(out)["model"]["trusted"] is True
    torch.save(nn.Linear(2, 2), tmp_path / "n.pt")
    _, out, _ = command("audit", str(tmp_path / "n.pt"), "--trust", "--format", "json")
    assert json.loads(out)["model"]["trusted"] is False  # nothing in it needed trust


ATTACKS = {
    "call-of-a-layer": (b"\x80\x02" + glob(LINEAR) + b"J\x00\x00\x01\x00J\x00\x00\x01\x00\x86R.", {}),
    "tensor-beyond-its-data": (one(tensor(HUGE + b"\x85", b"K\x01\x85", count=HUGE)), {"data/0": bytes(16)}),
    "expanded-tensor": (one(tensor(HUGE + b"\x85", b"K\x00\x85")), {"data/0": bytes(16)}),
    "long-number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", {}),
    "doubled-tuples": (b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"}h\x00Ns.", {}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_pickles_do_not_grow_memory(packed, grows, name):
    pickled, records = ATTACKS[name]
    assert grows("audit", packed(pickled, records)) < 64


def test_a_compressed_bomb_does_not_grow_memory(packed, grows):
    path = packed(b"\x80\x02}.", {"data/0": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED)
    assert Path(path).stat().st_size < 2**20
    assert grows("audit", path) < 64


def test_a_sparse_file_that_claims_a_header_of_its_own_size(tmp_path, grows):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((2**33).to_bytes(8, "little") + b'{"a":')
        file.truncate(2**33 + 8)
    assert grows("audit", str(path)) < 64


def test_a_sound_file_costs_about_its_size(tmp_path, grows):
    safetensors.torch.save_file({"w": torch.ones(2**24)}, tmp_path / "m.safetensors")
    assert grows("audit", str(tmp_path / "m.safetensors")) < 2 * 64 + 64
