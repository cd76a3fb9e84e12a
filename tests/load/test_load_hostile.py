"""Files made to run code, to hang or to exhaust memory; a canary shows that none of them gets anywhere."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from emscan.errors import LoadError
from emscan.load import graph, load
from emscan.load.source import RefusalError, UnsafeError

HINT = (
    "save its weights alone (model.state_dict()) and name the architecture with --model, or pass --trust if you "
    "trust where the file comes from"
)
DAMAGED = "the file is damaged: copy or save it again"


def refusal(path: str) -> str:
    start = time.perf_counter()
    with pytest.raises(LoadError) as caught:
        load(path)
    assert time.perf_counter() - start < 10
    text = str(caught.value)
    assert text.startswith(f"cannot load {path}: ")
    assert text.isprintable()
    return text.removeprefix(f"cannot load {path}: ")


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def canary(tmp_path):
    """A file that a successful attack creates."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def glob(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


SAFE_LIST = ", which is not on the safe list; " + HINT
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


LINEAR = "torch.nn.modules.linear.Linear"
FLAT = b"(K\x03K\x03K\x03t"


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


def tensor(
    size: bytes, stride: bytes, *, offset: bytes = b"K\x00", count: bytes = b"K\x04", hooks: bytes = b"N"
) -> bytes:
    storage = b"(X\x07\x00\x00\x00storage" + glob("torch.FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return (
        glob("torch._utils._rebuild_tensor_v2")
        + b"("
        + storage
        + count
        + b"tQ"
        + offset
        + size
        + stride
        + b"\x89"
        + hooks
        + b"tR"
    )


def one(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x10"


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


def legacy(body: bytes, keys: bytes, data: bytes) -> bytes:
    return (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
        + body
        + b"\x80\x02"
        + keys
        + b"."
        + data
    )


def legacy_tensor(count: bytes) -> bytes:
    return one(tensor(b"K\x01\x85", b"K\x01\x85", count=count + b"N"))


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


def test_legacy_modules_are_refused(saved):
    path = saved(nn.Linear(2, 2), _use_new_zipfile_serialization=False)
    assert refusal(path) == f"it is a module in the format of torch before 1.6, which carries its source code; {HINT}"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols(saved, protocol):
    path = saved(nn.Linear(2, 2), pickle_protocol=protocol)
    assert refusal(path) == f"it is written in pickle protocol {protocol}, which torch reads only unsafely; {HINT}"


def planted(module: nn.Module, **attributes: object) -> nn.Module:
    vars(module).update(attributes)
    return module


def hooked(register: str) -> nn.Module:
    module = nn.Linear(2, 2)
    getattr(module, register)(F.relu)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hooked("register_forward_hook"), "its Linear carries hooks (_forward_hooks), which would run as code"),
        (lambda: hooked("register_forward_pre_hook"), "its Linear carries hooks (_forward_pre_hooks)"),
        (lambda: hooked("register_full_backward_hook"), "its Linear carries hooks (_backward_hooks)"),
        (lambda: hooked("register_state_dict_pre_hook"), "its Linear carries hooks (_state_dict_pre_hooks)"),
        (lambda: planted(nn.Linear(2, 2), forward=F.relu), "its Linear replaces forward of its class"),
        (lambda: planted(nn.Linear(2, 2), half=F.relu), "its Linear replaces half of its class"),
        (lambda: planted(nn.Linear(2, 2), __setstate__=F.relu), "its Linear replaces __setstate__ of its class"),
        (lambda: planted(nn.Linear(2, 2), kind=nn.Linear), "it holds Linear, which is no layer, tensor or plain value"),
        (lambda: planted(nn.Linear(2, 2), inner=nn.ReLU()), "its Linear holds a layer outside its list of layers"),
        (lambda: planted(nn.Linear(2, 2), inner=[[nn.ReLU()]]), "its Linear holds a layer outside its list of layers"),
        (lambda: planted(nn.Linear(2, 2), _modules={"a.b": nn.ReLU()}), "its Linear has a malformed entry in _modules"),
        (lambda: planted(nn.Linear(2, 2), _modules={"a": 3}), "its Linear has a malformed entry in _modules"),
        (lambda: planted(nn.Linear(2, 2), _parameters=None), "its Linear lacks what every layer has"),
        (lambda: planted(nn.Linear(2, 2), training=1), "its Linear lacks what every layer has"),
        (lambda: {"w": torch.ones(2), "f": nn.Linear}, "it holds Linear, which is no layer"),
        (lambda: prune.identity(nn.Linear(2, 2), "weight"), "unpickling it would import torch.nn.utils"),
        (lambda: nn.LazyLinear(2), "unpickling it would import torch.nn.modules.linear.LazyLinear"),
        (lambda: {"w": torch.ones(2).to_sparse()}, "unpickling it would import torch._utils._rebuild_sparse_tensor"),
        (lambda: {"s": torch.ones(2).untyped_storage()}, "it holds torch.storage.TypedStorage"),
    ],
)
def test_objects_are_refused(saved, make, reason):
    assert refusal(saved(make())).startswith(reason)


def test_layers_that_never_end(saved):
    loop = nn.Sequential(nn.Linear(2, 2))
    loop._modules["again"] = nn.Sequential()
    loop._modules["again"]._modules["back"] = loop
    assert refusal(saved(loop)).startswith("one of its layers contains itself")

    layer: nn.Module = nn.Identity()
    for _ in range(40):
        layer = nn.Sequential(layer, layer)
    assert refusal(saved(layer)).startswith("one pass would visit its layers more than 100,000 times")

    for _ in range(200):
        layer = nn.Sequential(layer)
    with pytest.raises(UnsafeError, match="its layers are nested more than 200 deep"):
        graph.check_graph(layer)


def test_deep_and_wide_plain_values(packed):
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 50_000 + b"N" + b"s" * 50_000 + b"."
    assert refusal(packed(deep)) == "its dicts are nested too deep; save a module or its state_dict"
    doubled = b"\x80\x02(Nq\x00" + b"h\x00h\x00\x86q\x00" * 5_000 + b"t."
    assert refusal(packed(doubled)) == "it holds a tuple, not a model; save a module or its state_dict"


def test_no_end_of_instructions(packed, monkeypatch):
    monkeypatch.setattr("emscan.load.pickles._STEPS", 1000)
    assert refusal(packed(b"\x80\x02]" + b"Na" * 2000 + b".")).startswith("its pickle has more than 1,000 instructions")


def test_the_second_fence_alone(canary):
    """What the first fence would have to miss."""
    ordered = OrderedDict(w=torch.ones(1))
    ordered.values = F.relu
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(F.relu)
    for value in (ordered, tensor, [os.system], functools.partial(os.system), Path(), nn.Linear, Call(os.system)):
        with pytest.raises(UnsafeError):
            graph.check_graph(value)


def test_nothing_is_allocated_that_the_file_does_not_hold(packed):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    body = glob(LINEAR) + b"J\x00\x00\x01\x00J\x00\x00\x01\x00\x86R"  # 2**32 weights
    refusal(packed(b"\x80\x02" + body + b"."))
    refusal(packed(one(tensor(HUGE + b"\x85", b"K\x01\x85", count=HUGE)), {"data/0": bytes(16)}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


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


@pytest.mark.parametrize("change", [{"num_heads": 0}, {"num_heads": -2}, {"num_heads": 3}, {"head_dim": "4"}])
def test_attention_whose_numbers_lie(saved, change):
    """torch's fused kernel would divide by zero and end the process."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    vars(layer.self_attn).update(change)
    assert refusal(saved(layer)).startswith("its MultiheadAttention has heads that do not match its width")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 10**12}, "has weights that do not match its sizes"),
        ({"num_layers": 1}, "has weights that do not match its sizes"),
        ({"hidden_size": 400}, "has weights that do not match its sizes"),
        ({"input_size": 1}, "has weights that do not match its sizes"),
        ({"bidirectional": True}, "has weights that do not match its sizes"),
        ({"bias": False}, "has weights that do not match its sizes"),
        ({"mode": "LSTM_CELL"}, "lacks what the layer has"),
        ({"num_layers": "2"}, "lacks what the layer has"),
        ({"_flat_weights": []}, "lacks what the layer has"),
        ({"_flat_weights_names": None}, "lacks what the layer has"),
    ],
)
def test_recurrent_layers_whose_numbers_lie(kind, change, reason):
    """torch's kernels would read beyond the weights and crash."""
    state = {**vars(kind(3, 4, 2)), "_flat_weight_refs": [], **change}
    layer = kind.__new__(kind)
    vars(layer).update(state)
    with pytest.raises(RefusalError, match=f"its {kind.__name__} {reason}"):
        graph.check_graph(layer)
    graph.check_graph(kind(3, 4, 2, bias=False, bidirectional=True))
