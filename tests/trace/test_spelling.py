"""Kernels read as the public operators that they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emscan.trace import fused, spelling
from emscan.trace.record import record
from emscan.trace.training import in_evaluation

ATEN = torch.ops.aten
BUDGET = 1 << 26


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X, IMAGE, HEADS = draw(6, 8), draw(2, 4, 6, 6), draw(2, 2, 5, 8)
ONES, ZEROS = torch.ones(4), torch.zeros(4)
CALLS = {
    "softmax": (ATEN._softmax.default, (X, -1, False)),
    "log_softmax": (ATEN._log_softmax.default, (X, 0, False)),
    "log_sigmoid": (ATEN.log_sigmoid_forward.default, (X,)),
    "layer_norm": (ATEN.native_layer_norm.default, (X, [8], draw(8), None, 1e-3)),
    "rms_norm": (ATEN._fused_rms_norm.default, (X, [8], draw(8), 1e-3)),
    "group_norm": (ATEN.native_group_norm.default, (IMAGE, ONES, draw(4), 2, 4, 36, 2, 1e-3)),
    "batch_norm": (ATEN.native_batch_norm.default, (IMAGE, draw(4), None, ZEROS, 2 * ONES, False, 0.1, 1e-3)),
    "batch_norm in eval": (
        ATEN._native_batch_norm_legit_no_training.default,
        (IMAGE, draw(4), ONES, ZEROS, 2 * ONES, 0.1, 1e-3),
    ),
    "batch_norm without statistics": (
        ATEN._native_batch_norm_legit.no_stats, (IMAGE, draw(4), ONES, True, 0.1, 1e-3)
    ),
    "conv2d": (ATEN.convolution.default, (IMAGE, draw(6, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)),
    "conv1d": (ATEN.convolution.default, (IMAGE[0], draw(6, 6, 3), draw(6), [1], [1], [1], False, [0], 1)),
    "conv_transpose2d": (
        ATEN.convolution.default,
        (IMAGE, draw(4, 3, 3, 3), draw(3), [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
    ),
    "conv2d, padding by name": (
        ATEN._convolution_mode.default, (IMAGE, draw(6, 4, 3, 3), None, [1, 1], "same", [1, 1], 1)
    ),
    "max_pool2d": (ATEN.max_pool2d_with_indices.default, (IMAGE, [2, 2], [2, 2], [1, 1])),
    "adaptive_avg_pool2d": (ATEN._adaptive_avg_pool2d.default, (IMAGE, [2, 3])),
    "weight_norm": (ATEN._weight_norm_interface.default, (X, draw(6, 1), 0)),
    "dropout": (ATEN.native_dropout.default, (X, 0.5, False)),
    "cdist": (ATEN._cdist_forward.default, (X, draw(3, 8), 1.0, None)),
    "euclidean": (ATEN._euclidean_dist.default, (X, draw(3, 8))),
    "embedding_bag": (ATEN._embedding_bag.default, (X, torch.tensor([0, 3, 5]), torch.tensor([0, 2]), False, 1)),
    "index_add": (ATEN.index_put.default, (X, [None, torch.tensor([1, 1, 7])], draw(6, 3), True)),
    "flash": (ATEN._scaled_dot_product_flash_attention_for_cpu.default, (HEADS, HEADS.flip(2), HEADS, 0.0, True)),
    "math": (ATEN._scaled_dot_product_attention_math.default, (HEADS, HEADS.flip(2), HEADS, draw(5, 5))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_public_operator_gives_the_same_numbers(name: str) -> None:
    kernel, args = CALLS[name]
    func, given, named = spelling.public(kernel, args, {})
    assert func is not kernel
    assert not func._schema.name.rpartition("::")[2].startswith("_") or name == "weight_norm"
    out, wanted = func(*given, **named), kernel(*args)
    out, wanted = (item[0] if isinstance(item, tuple) else item for item in (out, wanted))
    assert torch.allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "kernel",
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention "
    "cudnn_batch_norm miopen_batch_norm mkldnn_linear cudnn_convolution".split(),
)
def test_kernels_of_other_devices_give_every_argument_that_they_have(kernel: str) -> None:
    func = getattr(ATEN, kernel).default
    names = [argument.name for argument in func._schema.arguments]
    given = {name: draw(2, 2, 3, 3) if name == "weight" else name for name in names}
    positional = [given[a.name] for a in func._schema.arguments if not a.kwarg_only]
    public, args, kwargs = spelling.public(func, positional, {n: v for n, v in given.items() if v not in positional})
    assert public is not func
    spelled = dict(zip((a.name for a in public._schema.arguments), args, strict=False)) | kwargs
    for name in ("query", "key", "value", "scale", "is_causal", "running_mean", "running_var", "bias", "groups"):
        if name in names and name in spelled:
            assert spelled[name] == name
    if "attn_bias" in names:
        assert spelled["attn_mask"] == "attn_bias"
    if "epsilon" in names:
        assert spelled["eps"] == "epsilon"
    if "weight" in names:
        assert spelled["weight"] is given["weight"]


def test_operators_that_write_are_left_alone() -> None:
    args = (IMAGE, ONES, ZEROS, ZEROS.clone(), ONES.clone(), True, 0.1, 1e-3)
    assert spelling.public(ATEN._native_batch_norm_legit.default, args, {})[0] is ATEN._native_batch_norm_legit.default


def test_what_a_fused_operator_stands_for_gives_its_numbers() -> None:
    weight, bias = draw(8, 8), draw(8)
    for gelu in (False, True):
        wanted = ATEN._addmm_activation(bias, X, weight, use_gelu=gelu)
        assert torch.allclose(fused.addmm_activation(bias, X, weight, use_gelu=gelu), wanted, atol=1e-5)
    assert torch.equal(fused.add_relu(X, draw(6, 8), alpha=2), (X + 2 * draw(6, 8)).relu())
    mask = draw(2, 5) > 0
    mask[:, 0] = False
    scores = draw(2, 2, 5, 5)
    wanted = scores.masked_fill(mask[:, None, None, :], -torch.inf).softmax(-1)
    assert torch.allclose(fused.masked_softmax(scores, mask, -1, 1), wanted)


@pytest.mark.parametrize("mask_type", [None, 0, 1, 2])
@pytest.mark.parametrize("weights", [False, True])
def test_the_fused_attention_stands_for_the_module(mask_type: int | None, weights: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    x = draw(3, 5, 16)
    masks = {0: torch.ones(5, 5).triu(1).bool(), 1: torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])}
    masks[2] = masks[0] | masks[1][:, None, None, :].expand(3, 2, 5, 5)
    rest = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    args = (x, x, x, 16, 2, *rest, masks.get(mask_type), weights, True, mask_type)
    out, shares = fused.native_multi_head_attention(*args)
    wanted = ATEN._native_multi_head_attention(*args)
    assert torch.allclose(out, wanted[0], atol=1e-5)
    if weights:
        assert torch.allclose(shares, wanted[1], atol=1e-5)


def test_calls_written_in_training_mode() -> None:
    off, _ = in_evaluation(ATEN.dropout.default, (X, 0.5, True), {})
    assert off == (X, 0.5, False)
    args, _ = in_evaluation(ATEN.batch_norm.default, (IMAGE, ONES, ZEROS, ZEROS, ONES, True, 0.1, 1e-3, False), {})
    assert args[5] is False
    args, _ = in_evaluation(ATEN.batch_norm.default, (IMAGE, ONES, ZEROS, None, None, True, 0.1, 1e-3, False), {})
    assert args[5] is True  # there is nothing else to normalize by
    _, kwargs = in_evaluation(ATEN.scaled_dot_product_attention.default, (HEADS, HEADS, HEADS), {"dropout_p": 0.1})
    assert kwargs == {"dropout_p": 0.0}


def test_a_slice_that_takes_all_is_no_operator() -> None:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.a(x)
            whole = ATEN.slice.Tensor(z, 0, 0, 9223372036854775807)
            z.relu_()
            return whole + ATEN.slice.Tensor(z, 1, 0, 2).sum()

    trace = record(M(), (X,), {}, budget=BUDGET)
    assert [call.op for call in trace.calls if call.op == "aten.slice"] == ["aten.slice"]
    add = trace.calls[-1]
    written = add.inputs[0].call
    assert written.op == "emscan.mutated"  # what was written through the original is seen through the slice
    assert any(value.call and value.call.op == "aten.relu" for value in written.inputs)
