"""Pickles made to run code, to hang or to exhaust memory; a canary shows that none of them gets anywhere."""

from __future__ import annotations

import functools
import io
import os
import pickle
import warnings

import pytest
import torch
from torch import nn

from emscan.errors import LoadError
from emscan.load import load
from emscan.load.format_checkpoint import NAMED
from tests.hostile.helpers import DAMAGED, HINT, LINEAR, SAFE_LIST, Call, glob, refusal

SYSTEM = f"{os.system.__module__}.system"


@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("attack", ["system", "eval", "partial", "open", "load"])
def test_calls_are_refused_by_name(canary, packed, written, saved, container, attack):
    value, name = {
        "system": (Call(os.system, f"touch {canary}"), SYSTEM),
        "eval": (Call(eval, f"open({str(canary)!r}, 'w')"), "builtins.eval"),
        "partial": (functools.partial(os.system, f"touch {canary}"), f"functools.partial, {SYSTEM}"),
        "open": (Call(io.open, str(canary), "w"), f"{io.open.__module__}.open"),
        "load": (Call(torch.hub.load, str(canary), "x"), "torch.hub.load"),
    }[attack]
    if container == "zip":
        assert refusal(packed(pickle.dumps(value, 2))) == f"unpickling it would import {name}{SAFE_LIST}"
    elif container == "legacy":
        path = saved(value, _use_new_zipfile_serialization=False)
        assert refusal(path) == f"unpickling it would import {name}{SAFE_LIST}"
    else:
        for protocol in range(6):
            assert refusal(written(pickle.dumps(value, protocol))) == (
                f"it is a pickle that torch.save did not write, and unpickling it would import {name}; {HINT}"
            )


def test_every_import_is_named(canary, packed):
    value = [Call(os.system, f"touch {canary}"), Call(eval, "1"), Call(getattr, 1, "real"), nn.Linear(1, 1)]
    text = refusal(packed(pickle.dumps(value, 2)))
    assert text == (
        f"unpickling it would import {SYSTEM}, builtins.eval, builtins.getattr, torch.storage._load_from_bytes"
        f"{SAFE_LIST}"
    )


def test_names_cannot_write_to_the_terminal(packed):
    text = refusal(packed(b"\x80\x02c\x1b[31mred\x07\nx\\\r\n."))
    assert text.startswith("unpickling it would import \\x1b[31mred\\x07.x")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (glob(LINEAR) + b"J@B\x0f\x00J@B\x0f\x00\x86R", f"it would call {LINEAR}, which loading a model never needs"),
        (
            glob("torch.nn.functional.relu") + b"K\x01\x85R",
            "it would call torch.nn.functional.relu, which loading a model never needs",
        ),
        (
            glob("torch.FloatStorage") + b"J\xff\xff\xff\x7f\x85R",
            "it would call torch.FloatStorage, which loading a model never needs",
        ),
        (
            glob("torch.Tensor") + b"J\xff\xff\xff\x7f\x85R",
            "it would call torch.Tensor, which loading a model never needs",
        ),
        (glob(LINEAR) + b"K\x03K\x03\x86\x81", f"it would construct {LINEAR} with arguments of its own"),
        (glob("torch.Tensor") + b")\x81", "it would construct torch.Tensor with arguments of its own"),
        (glob("collections.OrderedDict") + b"]\x85R", "it would fill an OrderedDict in a call, as Python 2 did"),
        (
            glob("collections.OrderedDict") + b")R}X\x05\x00\x00\x00itemsNsb",
            "it would set attributes of an OrderedDict",
        ),
        (
            glob(LINEAR) + b")\x81}b}b",
            "it would change the state of an object twice, or of one that is no layer",
        ),
        (glob(LINEAR) + b")\x81]b", "it would set a state that is no plain dict of attributes"),
        (glob(LINEAR) + b"}b", "it would change the state of an object twice, or of one that is no layer"),
        (b"K\x01}b", "it would change the state of an object twice, or of one that is no layer"),
        (b")))s", "it would set items of a tuple"),
        (b")K\x01a", "it would append to a tuple"),
        (b"}((K\x01tK\x02tK\x03s", "it has a dict or set with keys that are no plain values"),
        (
            glob("torch.nn.modules.rnn.LSTM") + b")\x81}X\x0c\x00\x00\x00_all_weights]]K\x01aasb",
            "its recurrent layer has the state of a torch before 1.0",
        ),
        (b"X\x03\x00\x00\x00abcQ", "it refers to data outside its pickle in a way that torch.save does not"),
        (b"X\x03\x00\x00\x00abc\x85Q", "it refers to data outside its pickle in a way that torch.save does not"),
        (b"\x82\x01", "its pickle uses opcode 0x82, which torch.save does not write"),
        (b"(i__builtin__\neval\n", "unpickling it would import builtins.eval, which is not on the safe list"),
        (b"\x93", "its pickle uses opcode 0x93, which torch.save does not write"),
        (glob("_codecs.encode") + b"X\x01\x00\x00\x00aX\x06\x00\x00\x00base64\x86R", "it would encode text in a way"),
        (glob("builtins.set") + b"X\x01\x00\x00\x00a\x85R", "it would make a set of something that is no list"),
        (
            glob("torch._utils._rebuild_parameter") + b"K\x01\x88N\x87R",
            "it has a parameter that is no tensor",
        ),
    ],
)
def test_instructions_are_refused(packed, body, reason):
    text = refusal(packed(b"\x80\x02" + body + b"."))
    assert text.startswith(reason)
    assert text.endswith(HINT)


@pytest.mark.parametrize(
    "body",
    [b"", b"K", b"X\xff\xff\xff\xffab", b"R", b"}b", b"t", b"h\x07", b"u", b"]K\x01K\x02", b"\x85", b"c", b"cab"],
)
def test_broken_pickles(packed, body):
    text = refusal(packed(b"\x80\x02" + body + b"."))
    assert text.startswith("its pickle ")
    assert text.endswith(DAMAGED)


def test_legacy_modules_are_refused(saved):
    path = saved(nn.Linear(2, 2), _use_new_zipfile_serialization=False)
    assert refusal(path) == f"it is a module in the format of torch before 1.6, which carries its source code; {NAMED}"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols(saved, protocol):
    path = saved(nn.Linear(2, 2), pickle_protocol=protocol)
    assert refusal(path) == f"it is written in pickle protocol {protocol}, which torch reads only unsafely; {HINT}"


def test_deep_and_wide_plain_values(packed):
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 50_000 + b"N" + b"s" * 50_000 + b"."
    assert refusal(packed(deep)) == "its dicts are nested too deep; save a module or its state_dict"
    doubled = b"\x80\x02(Nq\x00" + b"h\x00h\x00\x86q\x00" * 5_000 + b"t."
    assert refusal(packed(doubled)) == "it holds a tuple, not a model; save a module or its state_dict"


def test_no_end_of_instructions(packed, monkeypatch):
    monkeypatch.setattr("emscan.load.pickles._STEPS", 1000)
    assert refusal(packed(b"\x80\x02]" + b"Na" * 2000 + b".")).startswith("its pickle has more than 1,000 instructions")


def test_an_environment_variable_does_not_switch_safety_off(canary, packed, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal(packed(pickle.dumps(Call(os.system, f"touch {canary}"), 2)))


def test_trust_is_what_lets_it_run(tmp_path, packed):
    """The canary does sing: the attack above is a real one."""
    sung = tmp_path / "sung"
    path = packed(pickle.dumps({"w": torch.ones(1).tolist(), "f": Call(os.system, f"touch {sung}")}, 2))
    with warnings.catch_warnings(), pytest.raises(LoadError):  # runs, and then holds no tensors
        load(path, trust=True)
    assert sung.exists()
