"""One network, one report, in whatever form the network comes.

Whole documents are compared. A form may be silent about where a call stood (``module``, ``evidence.source``); where its
operators are others (decomposed programs), their names may differ, and nothing else.
"""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import emscan

# What these forms themselves warn about is torch's business.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning",
    "ignore:.*[Ww]eight_norm.*", "ignore:.*requires_grad=True.*", "ignore:.*were assigned during export.*",
    "ignore:.*flex_attention called without.*", "ignore:.*nested tensors.*", "ignore:.*TF32 acceleration.*",
)  # fmt: skip
ATEN = torch.ops.aten
DEAD = [2, 7, 19]
_SILENT = ("module", "source")
_BATCH = torch.export.Dim("batch", min=2)


# ---- comparison -----------------------------------------------------------------------------------------------------
def document(model: Any, x: Any) -> dict[str, Any]:
    found = emscan.audit(model, x, batch_size=16 if isinstance(x, Tensor) else None).to_dict()
    for key in ("model", "environment"):
        found.pop(key)
    for finding in found["findings"]:
        finding["message"] = re.sub(
            r"\d[\d.e+-]*", "#", finding["message"]
        )  # it quotes numbers that are compared above
    return found


def elsewhere(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out where calls stood."""
    text = copy.deepcopy(found)
    for layer in text["layers"]:
        layer["module"] = None
        if layer["evidence"]:
            layer["evidence"]["source"] = None
        layer["source"] = None
    return text


def differences(a: Any, b: Any, where: str = "", *, tolerance: float = 1e-5, silent: bool = True) -> list[str]:
    """Return the places where ``b`` says something else than ``a``."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: {sorted(a.keys() ^ b.keys())}"] if a.keys() != b.keys() else []
        for key in a.keys() & b.keys():
            if not (silent and key in _SILENT and b[key] is None):
                found += differences(a[key], b[key], f"{where}.{key}", tolerance=tolerance, silent=silent)
        return found
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}: {a} and {b}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [
            line
            for i, (p, q) in pairs
            for line in differences(p, q, f"{where}[{i}]", tolerance=tolerance, silent=silent)
        ]
    if isinstance(a, float) and isinstance(b, float | int):
        return [] if math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) else [f"{where}: {a} and {b}"]
    return [] if a == b else [f"{where}: {a} and {b}"]


def other_operators(found: dict[str, Any], names: dict[str, str] | None = None) -> dict[str, Any]:
    """Leave out which operators there were, and read ``names`` of parameters as what they stand for."""
    text = copy.deepcopy(found)
    text.pop("coverage")
    for layer in text["layers"]:
        layer["name"] = (names or {}).get(layer["name"], layer["name"])
        if layer["evidence"]:
            layer["evidence"]["op"] = None
    for finding in text["findings"]:
        finding.pop("fingerprint")
        finding["message"] = finding["layer"] = None
    return text


def other_dtype(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out what names the dtype; the errors stay below a tolerance that follows from it."""
    text = copy.deepcopy(found)
    for layer in text["layers"]:
        evidence = layer["evidence"] or {}
        for key in ("sum_error", "gradient_error"):
            if evidence.get(key) is not None:
                assert evidence[key] <= evidence["tolerance"]
        for key in ("sum_error", "gradient_error", "tolerance", "dtype"):
            evidence.pop(key, None)
    return text


# ---- networks -------------------------------------------------------------------------------------------------------
def kill(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight[DEAD] = 0
        layer.bias[DEAD] = -1


def plain() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 5), nn.Softmax(-1))
    kill(model[0])
    return model


class Spelled(nn.Module):
    """``plain`` in the functional spelling, with its parameters under the same names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in ("0", "2", "4"):
            self.add_module(name, model.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        for name, gate in (("0", F.relu), ("2", torch.tanh), ("4", lambda z: F.softmax(z, -1))):
            layer = self.get_submodule(name)
            x = gate(F.linear(x, layer.weight, layer.bias))
        return x


class Encoder(nn.Module):
    """The fused encoder path with a padding mask; the padding does not reach the output."""

    def __init__(self, activation: str = "relu", norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 2, 24, batch_first=True, activation=activation, norm_first=norm_first, dropout=0.3
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        padded = (torch.arange(x.shape[1]) >= 4).expand(x.shape[0], -1)
        out = self.blocks(x, src_key_padding_mask=padded)
        return self.head(out[:, :4].mean(1)).softmax(-1)


class Weighted(nn.Module):
    """nn.MultiheadAttention whose weights are handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attention(x, x, x)
        return self.head(mixed), weights


class Attention(nn.Module):
    """Causal attention through a function of queries, keys and values, each (N, H, T, E)."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(24, momentum=0.0)  # a trace in training mode runs the model, which would learn
        self.group, self.up, self.fc = nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.Linear(6, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_(std=0.1)
            self.norm.running_var.uniform_(0.8, 1.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.a(x))), 2)
        x = F.gelu(self.up(F.silu(self.group(self.b(x)))))
        return self.fc(x.mean((2, 3))).log_softmax(-1)


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.layers[0](x), approximate="tanh")
        x = F.hardswish(self.layers[1](x))
        x = F.elu(self.layers[2](x))
        x = F.leaky_relu(self.layers[3](x))
        x = F.logsigmoid(self.layers[4](x))
        return self.layers[5](x).clamp(-0.5, 0.5)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        share, index = self.gate(x).softmax(-1).topk(2, -1)
        share = share / share.sum(-1, keepdim=True)
        out = torch.einsum("bi,eio->beo", x, self.experts)
        return (out.gather(1, index[..., None].expand(-1, -1, 16)) * share[..., None]).sum(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x))).softmax(-1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True), nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1]).softmax(-1)


class Around(nn.Module):
    """A model that calls another one as its part."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any] = lambda inner, x: inner(x)) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x)


def sequence() -> Tensor:
    return torch.randn(32, 6, 16)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "plain": (plain, lambda: torch.randn(64, 12)),
    "encoder": (Encoder, sequence),
    "encoder, norm first": (lambda: Encoder("gelu", norm_first=True), sequence),
    "weighted": (Weighted, sequence),
    "convolutional": (Convolutional, lambda: torch.randn(32, 3, 12, 12)),
    "gates": (Gates, lambda: torch.randn(64, 16)),
    "halves": (lambda: nn.Sequential(nn.Linear(16, 16), nn.GLU(), nn.Linear(8, 5)), lambda: torch.randn(64, 16)),
    "router": (Router, lambda: torch.randn(64, 16)),
    "tied": (Tied, lambda: torch.randint(0, 20, (32, 6))),
    "recurrent": (Recurrent, sequence),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, draw = NETWORKS[name]
    model, x = build(), draw()
    with torch.no_grad():
        for parameter in model.parameters() if name != "plain" else ():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # no two are alike: freezing merges those that are
    return model, x


@pytest.fixture(scope="module")
def reports() -> Callable[[str], dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}

    def report(name: str) -> dict[str, Any]:
        if name not in made:
            model, x = network(name)
            made[name] = document(model.eval(), x)
        return copy.deepcopy(made[name])

    return report


# ---- TorchScript, torch.export, FX ----------------------------------------------------------------------------------
def saved_and_loaded(model: nn.Module, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.export.save(exported(model, x), file)
    file.seek(0)
    return torch.export.load(file)


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=({0: _BATCH},))


GRAPHS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "script": lambda model, x: torch.jit.script(model.eval()),
    "trace": lambda model, x: torch.jit.trace(model.eval(), x, check_trace=False),
    "export": lambda model, x: exported(model.eval(), x),
    # Without gradients TorchScript takes the fused paths: it asks for itself, and emscan cannot switch them off there.
    "script without gradients": lambda model, x: torch.jit.script(model.eval().requires_grad_(False)),
    "trace without gradients": lambda model, x: torch.jit.trace(
        model.eval().requires_grad_(False), x, check_trace=False
    ),
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.script(model.eval())),
}


@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "convolutional"])
def test_graphs(reports, name: str, form: str) -> None:
    model, x = network(name)
    assert differences(reports(name), document(GRAPHS[form](model, x), x)) == []


@pytest.mark.parametrize("form", [form for form in GRAPHS if form != "frozen"])
def test_graphs_of_a_convolutional_network(reports, form: str) -> None:
    model, x = network("convolutional")
    assert differences(reports("convolutional"), document(GRAPHS[form](model, x), x)) == []


@pytest.mark.parametrize("name", ["plain", "convolutional", "gates", "router", "tied"])
def test_fx_and_a_saved_program(reports, name: str) -> None:
    model, x = network(name)
    assert differences(reports(name), document(torch.fx.symbolic_trace(model.eval()), x)) == []
    assert differences(reports(name), document(saved_and_loaded(model.eval(), x), x)) == []


@pytest.mark.parametrize("name", ["encoder", "convolutional"])
def test_training_mode_left_on(reports, name: str) -> None:
    model, x = network(name)
    assert model.training
    assert differences(reports(name), document(model, x), silent=False) == []
    assert model.training
    assert differences(reports(name), document(exported(model, x), x)) == []
    assert differences(reports(name), document(torch.jit.trace(model, x, check_trace=False), x)) == []


@pytest.mark.parametrize("name", ["plain", "gates", "router", "convolutional", "tied"])
def test_decomposed_programs(reports, name: str) -> None:
    model, x = network(name)
    found = document(exported(model.eval(), x).run_decompositions(), x)
    assert found["coverage"]["unclassified"] == []
    assert differences(other_operators(reports(name)), other_operators(found)) == []


@pytest.mark.parametrize("name", ["plain", "gates", "router", "convolutional"])
def test_graphs_of_kernels(reports, name: str) -> None:
    """What a compiler's graph calls, below the public operators; it has lost the names of the parameters."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = network(name)
    with torch.no_grad():
        graph = make_fx(model.eval().requires_grad_(False), tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    whole = reports(name)
    found = document(graph, x)
    names = {q["name"]: p["name"] for p, q in zip(whole["layers"], found["layers"], strict=True)}
    assert len(set(names.values())) == len(names)
    assert differences(whole["coverage"], found["coverage"]) == []
    assert differences(other_operators(whole), other_operators(found, names)) == []


def test_weights_folded_into_a_frozen_graph() -> None:
    model, x = network("convolutional")
    fused = copy.deepcopy(model).eval()
    fused.a, fused.norm = fuse_conv_bn_eval(fused.a, fused.norm), nn.Identity()
    whole = document(fused, x)
    assert [layer["composition"] for layer in whole["layers"][:2]] == ["Conv2d + ReLU", "Conv2d + MaxPool2d"]
    assert differences(whole, document(torch.jit.freeze(torch.jit.script(model.eval())), x), tolerance=1e-4) == []


def test_kernels_that_run_unseen_make_the_audit_inconclusive() -> None:
    model, x = network("convolutional")
    found = document(torch.jit.optimize_for_inference(torch.jit.script(model.eval())), x)
    mechanisms = [layer["mechanism"] for layer in found["layers"]]
    assert {"threshold", "selection", "logistic", "smooth-gate", "softmax"} <= set(mechanisms)
    if torch.backends.mkldnn.is_available():
        assert found["summary"]["status"] == "inconclusive"
        assert found["coverage"]["unclassified"][0]["op"] == "mkldnn.unseen"


def test_a_detour_outside_torch_makes_the_audit_inconclusive() -> None:
    def call(inner: nn.Module, x: Tensor) -> Tensor:
        return torch.from_numpy(inner(x).softmax(-1).numpy() * 2)

    found = document(Around(nn.Linear(12, 5), call), torch.randn(64, 12))
    assert found["layers"][0]["composition"] == "Linear + Softmax"
    assert found["coverage"]["unclassified"][0]["op"] == "numpy.unseen"
    assert found["summary"]["status"] == "inconclusive"


def test_weights_that_do_not_exist_yet() -> None:
    with pytest.raises(emscan.errors.ModelError, match="lazy layers"):
        emscan.audit(nn.Sequential(nn.LazyLinear(4)), torch.randn(8, 12))


# ---- torch.compile --------------------------------------------------------------------------------------------------
def compiled_part(model: nn.Module, backend: str) -> nn.Module:
    model.blocks = torch.compile(model.blocks, backend=backend)
    return model


def compiled_in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_part_in_place(model: nn.Module, backend: str) -> nn.Module:
    model.blocks.layers[0].compile(backend=backend)
    return model


def compiled_function(model: nn.Module, backend: str) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


COMPILED: dict[str, tuple[Callable[[nn.Module, str], nn.Module], str]] = {
    "whole": (lambda model, backend: torch.compile(model, backend=backend), "aot_eager"),
    "part": (compiled_part, "eager"),
    "in place": (compiled_in_place, "eager"),
    "part in place": (compiled_part_in_place, "aot_eager"),
    "function": (compiled_function, "aot_eager"),
}


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("form", COMPILED)
def test_compiled(reports, form: str, warm: bool) -> None:
    model, x = network("encoder")
    compile_, backend = COMPILED[form]
    torch._dynamo.reset()
    model = compile_(model.eval(), backend)
    if warm:
        with torch.no_grad():
            model(x)
    # The Python code is there, so the report says where calls stood, too.
    assert differences(reports("encoder"), document(model, x), silent=False) == []


def test_compilation_inside_forward() -> None:
    model, x = network("plain")
    whole = elsewhere(document(Around(model), x))
    found = document(Around(model, lambda inner, x: torch.compile(inner, backend="eager")(x)), x)
    assert differences(whole, elsewhere(found)) == []


# ---- kernels --------------------------------------------------------------------------------------------------------
def causal(q: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "math": with_backend(SDPBackend.MATH),
    "flash": with_backend(SDPBackend.FLASH_ATTENTION),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal(q)),
    "kernel": lambda q, k, v: ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0],
    "kernel, mask": lambda q, k, v: ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=causal(q))[0],
    "math kernel": lambda q, k, v: ATEN._scaled_dot_product_attention_math(q, k, v, None, 0.0, True)[0],
}


@pytest.mark.parametrize("kernel", ATTENTION)
def test_kernels_of_attention(kernel: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), sequence()
    whole = elsewhere(document(model, x))
    assert whole["summary"]["em"] == 1
    model.attend = ATTENTION[kernel]
    assert differences(whole, elsewhere(document(model, x))) == []
    if kernel == "kernel":
        assert differences(whole, document(exported(model, x), x)) == []


def test_what_a_kernel_of_attention_hands_out_besides() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_partition = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out * torch.sigmoid(log_partition)[..., None]

    found = document(Attention(attend), sequence())
    assert sorted(layer["mechanism"] for layer in found["layers"] if layer["verdict"] == "em") == [
        "logistic",
        "softmax",
    ]


def test_tensors_made_of_tensors_are_looked_into() -> None:
    class Jagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 24)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.nested.nested_tensor([x[0, :3], x[1, :5]], layout=torch.jagged)
            return F.relu(self.a(rows)).values()

    torch.manual_seed(0)
    model = Jagged()
    kill(model.a)
    (row,) = document(model, torch.randn(2, 6, 12))["layers"]
    assert (row["name"], row["mechanism"], row["components"]["dead"]) == ("a", "threshold", DEAD)


def test_flex_attention_is_seen() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def earlier(score: Tensor, b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score, -math.inf)

    torch.manual_seed(0)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    x = sequence()
    (wanted,) = [layer for layer in document(model, x)["layers"] if layer["mechanism"] == "softmax"]
    for attend in (flex_attention, torch.compile(flex_attention, backend="eager")):
        model.attend = lambda q, k, v, attend=attend: attend(q, k, v, score_mod=earlier)
        (row,) = [layer for layer in document(model, x)["layers"] if layer["mechanism"] == "softmax"]
        for key in ("name", "verdict", "alternatives", "calls", "conditions"):
            assert row[key] == wanted[key]
        mine, theirs = wanted["responsibility"], row["responsibility"]
        assert differences(mine["entropy"], theirs["entropy"]) == []
        assert mine["competitions"] == theirs["competitions"]


def test_recurrent_kernels(reports) -> None:
    model, x = network("recurrent")
    with torch.backends.mkldnn.flags(enabled=False):
        assert differences(reports("recurrent"), document(model.eval(), x)) == []


def test_one_direction_of_an_lstm_by_onednn() -> None:
    from emscan.trace.fused import mkldnn_rnn_layer

    torch.manual_seed(0)
    layer = nn.LSTM(16, 8).requires_grad_(False)
    x, h, c = torch.randn(5, 3, 16), torch.randn(3, 8), torch.randn(3, 8)
    for reverse in (False, True):
        call = (x, *layer.parameters(), h, c, reverse, [], 2, 8, 1, True, False, False, False)
        for got, wanted in zip(mkldnn_rnn_layer(*call)[:3], ATEN.mkldnn_rnn_layer(*call)[:3], strict=True):
            assert torch.allclose(got, wanted, atol=1e-6)


def test_fused_products_with_a_gate() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(ATEN._addmm_activation(self.a.bias, x, self.a.weight.t()))

    torch.manual_seed(0)
    model = Fused()
    kill(model.a)
    row = document(model, torch.randn(64, 12))["layers"][0]
    assert (row["name"], row["mechanism"], row["components"]["dead"]) == ("a", "threshold", DEAD)


# ---- numbers and memory ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", ["plain", "encoder", "convolutional"])
def test_precision(reports, name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = network(name)
    found = document(model.to(dtype), x.to(dtype))
    for key in ("dead", "rare", "dormant", "starved", "provably_dead"):
        mine, theirs = (
            [(layer["components"] or {}).get(key) for layer in report["layers"]] for report in (reports(name), found)
        )
        assert mine == theirs
    assert differences(other_dtype(reports(name)), other_dtype(found), tolerance=tolerance) == []


def test_autocast_inside_and_outside(reports) -> None:
    def inside(inner: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return inner(x)

    model, x = network("plain")
    whole = elsewhere(document(Around(model), x))
    found = elsewhere(document(Around(model, inside), x))
    assert {layer["evidence"]["dtype"] for layer in found["layers"] if layer["verdict"] == "em"} == {"bfloat16"}
    assert differences(other_dtype(whole), other_dtype(found), tolerance=6e-2) == []
    graph = document(exported(Around(model, inside), x), x)
    assert differences(found, graph, tolerance=1e-3) == []
    plainly = reports("plain")  # made outside: it may be the first to ask
    with torch.autocast("cpu", torch.bfloat16):
        cast = document(model, x)
    assert differences(other_dtype(plainly), other_dtype(cast), tolerance=6e-2) == []


def test_channels_last_and_gradients(reports) -> None:
    model, x = network("convolutional")
    last = torch.channels_last
    moved = copy.deepcopy(model).to(memory_format=last)
    assert differences(reports("convolutional"), document(moved, x.to(memory_format=last))) == []
    still = copy.deepcopy(model).requires_grad_(False)
    assert differences(reports("convolutional"), document(still, x.clone().requires_grad_()), silent=False) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu(reports, name: str) -> None:
    model, x = network(name)
    tolerance = 1e-3  # reduced-precision products
    assert differences(reports(name), document(model.cuda(), x.cuda()), tolerance=tolerance, silent=False) == []


def test_complex_numbers() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 8, dtype=torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(torch.fft.fft(x, dim=-1))
            return z.abs().softmax(-1) + F.relu(z.real) * torch.sigmoid(z.imag)

    torch.manual_seed(0)
    model, x = Complex(), torch.randn(32, 16)
    whole = document(model, x)
    assert sorted(layer["mechanism"] for layer in whole["layers"]) == ["logistic", "softmax", "threshold"]
    for form in ("script", "export"):
        assert differences(whole, document(GRAPHS[form](model, x), x)) == []


# ---- wrappers, hooks, parametrizations ------------------------------------------------------------------------------
def checkpointed(reentrant: bool) -> Callable[..., Any]:
    def call(inner: nn.Module, x: Tensor) -> Tensor:
        for start in (0, 2, 4):
            x = checkpoint(inner[start : start + 2], x, use_reentrant=reentrant)
        return x

    return call


def functional_call(inner: nn.Module, x: Tensor) -> Any:
    return torch.func.functional_call(inner, dict(inner.named_parameters()), (x,))


INSIDE: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "vmap": lambda model, x: Around(model, lambda inner, x: torch.vmap(inner)(x)),
    "checkpoint": lambda model, x: Around(model, checkpointed(reentrant=False)),
    "reentrant checkpoint": lambda model, x: Around(model, checkpointed(reentrant=True)),
    "functional_call": lambda model, x: Around(model, functional_call),
    "script": lambda model, x: Around(torch.jit.script(model)),
    "frozen": lambda model, x: Around(torch.jit.freeze(torch.jit.script(model.eval()))),
    "export": lambda model, x: Around(exported(model, x).module()),
    "compile": lambda model, x: Around(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("form", INSIDE)
def test_inside_another_module(form: str) -> None:
    model, x = network("plain")
    whole = elsewhere(document(Around(model), x))
    assert differences(whole, elsewhere(document(INSIDE[form](model, x), x))) == []


def test_functional_spelling_and_wrappers(reports) -> None:
    model, x = network("plain")
    whole = reports("plain")
    assert differences(elsewhere(whole), elsewhere(document(Spelled(model), x))) == []
    assert differences(whole, document(nn.DataParallel(model), x), silent=False) == []
    assert differences(whole, document(torch.compile(nn.DataParallel(model), backend="eager"), x), silent=False) == []


def test_hooks_take_part() -> None:
    class Scaled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[2:](torch.sigmoid(self.inner[:2](x)))

    model, x = network("plain")
    whole = document(Scaled(model), x)
    model[1].register_forward_hook(lambda module, args, out: torch.sigmoid(out))
    model[0].register_full_backward_hook(lambda *_: None)
    found = document(Around(model), x.clone().requires_grad_())
    rows = [(row["name"], row["composition"], row["mechanism"], row["components"]["dead"]) for row in whole["layers"]]
    assert len(rows) == 4
    assert rows == [
        (row["name"], row["composition"], row["mechanism"], row["components"]["dead"]) for row in found["layers"]
    ]


def test_weight_normalization(reports) -> None:
    model, x = network("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model[2])
    assert differences(reports("plain"), document(model, x), tolerance=1e-4) == []
    model, x = network("plain")
    for parametrize in (torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.parametrizations.orthogonal):
        changed = parametrize(copy.deepcopy(model[2]))
        weight = changed.weight.detach()
        plain_layer = copy.deepcopy(model)
        with torch.no_grad():
            plain_layer[2].weight.copy_(weight)
        found = document(nn.Sequential(*model[:2], changed, *model[3:]).eval(), x)
        assert found["summary"]["status"] == "ok"
        assert [row["mechanism"] for row in found["layers"]] == ["threshold", "logistic", "softmax"]
        wanted = document(plain_layer, x)["layers"][1]["components"]
        assert differences(wanted, found["layers"][1]["components"], tolerance=1e-3) == []


# ---- higher-order operators and gradients ---------------------------------------------------------------------------
class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > -1e9, lambda x: F.relu(self.a(x)), lambda x: torch.tanh(self.b(x)), (x,))


class Taken(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))


def test_conditions_inside_a_graph() -> None:
    torch.manual_seed(0)
    model, x = Branch(), torch.randn(32, 16)
    taken = Taken()
    taken.load_state_dict(model.state_dict())
    whole = elsewhere(document(taken, x))
    assert differences(whole, elsewhere(document(model, x))) == []
    assert differences(whole, elsewhere(document(torch.export.export(model, (x[:16],)), x))) == []


def test_loops_inside_a_graph() -> None:
    from torch._higher_order_ops.map import map as map_
    from torch._higher_order_ops.scan import scan
    from torch._higher_order_ops.while_loop import while_loop

    def mapped(inner: nn.Module, x: Tensor) -> Tensor:
        return map_(lambda row: inner(row).softmax(-1), x)

    def scanned(inner: nn.Module, x: Tensor) -> Tensor:
        def step(state: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.tanh(inner(row) + state)
            return state, state.clone()

        return scan(step, torch.zeros(x.shape[0], 16), x.transpose(0, 1))[1]

    def looped(inner: nn.Module, x: Tensor) -> Tensor:
        return while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, F.relu(inner(x))), (torch.tensor(0), x))[1]

    x = sequence()
    for call, mechanism, calls in ((mapped, "softmax", 2), (scanned, "logistic", 6), (looped, "threshold", 3)):
        found = document(Around(nn.Linear(16, 16), call), x[:2])
        (row,) = found["layers"]
        assert (row["name"], row["mechanism"], row["calls"]) == ("inner", mechanism, calls)
        assert found["coverage"]["unclassified"] == []


def stopped(how: str) -> Callable[..., Tensor]:
    def call(inner: nn.Module, x: Tensor) -> Tensor:
        if how == "called":
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            share = inner[0](x).softmax(-1)
            torch.set_grad_enabled(before)
        else:
            block = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode(), "": nullcontext()}
            with torch.set_grad_enabled(False) if how == "set_grad_enabled" else block[how]:
                share = inner[0](x).softmax(-1)
        return (inner[1](x) * share).sigmoid()

    return call


class Stopped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            share = self.inner[0](x).softmax(-1)
        return (self.inner[1](x) * share).sigmoid()


def flags(found: dict[str, Any]) -> dict[str, list[str]]:
    return {layer["name"]: layer["flags"] for layer in found["layers"] if layer["verdict"] == "em"}


def test_blocks_without_gradients_in_every_form() -> None:
    torch.manual_seed(0)
    inner, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8)), torch.randn(32, 16)
    assert flags(document(Around(inner, stopped("")), x)) == {"inner.0": [], "inner.1": []}
    wanted = {"inner.0": ["detached"], "inner.1": []}
    for how in ("no_grad", "inference_mode", "set_grad_enabled", "called"):
        assert flags(document(Around(inner, stopped(how)), x)) == wanted
    whole = document(Stopped(inner), x)
    assert flags(whole) == wanted
    for form in ("script", "export"):
        assert differences(whole, document(GRAPHS[form](Stopped(inner), x), x)) == []


def test_a_sequence_of_batches_through_torchscript(reports) -> None:
    """TorchScript optimizes what it has run a few times; the names of computations must outlast that."""

    model, x = network("convolutional")
    script = torch.jit.script(model.eval())
    for _ in range(4):
        script(x)
    whole, found = document(model, [*x.split(8)]), document(script, [*x.split(8)])
    assert whole["probe"]["batches"] == 4
    assert differences(whole, found) == []
