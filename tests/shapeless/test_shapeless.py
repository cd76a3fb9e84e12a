"""Running models whose weights are on the meta device: what stays real, what does not, and that nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from emscan.shapeless import blueprint, is_shapeless, lacks_weights, shapeless, without_weights


class Body(nn.Module):
    """Hands a meta weight and real integers to a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 8, device="meta"))
        self.function = function

    def forward(self, ids: Tensor) -> Any:
        return self.function(F.embedding(ids, self.weight), ids)


IDS = torch.tensor([[0, 5, 2], [1, 3, 4]])


def run(function: Callable[[Tensor, Tensor], Any]) -> Any:
    model = Body(function)
    with shapeless(model), torch.inference_mode():
        out = model(IDS)
    assert type(model.weight) is nn.Parameter
    assert model.weight.is_meta
    return out


def real(tensor: Tensor) -> bool:
    return not is_shapeless(tensor)


def test_a_model_is_told_that_its_weights_are_on_the_cpu() -> None:
    seen = run(lambda x, ids: (x.device, x.is_meta, x.is_cpu, x.data.device, x.mT.device, x[0].device))
    assert seen == (torch.device("cpu"), False, True, *[torch.device("cpu")] * 3)


def test_what_comes_from_weights_has_a_shape_only() -> None:
    out = run(lambda x, ids: (x @ x.mT).softmax(-1))
    assert is_shapeless(out)
    assert out.shape == (2, 3, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, ids: torch.arange(3, device=x.device),
        lambda x, ids: torch.full((3, 3), -1e9, device=x.device, dtype=x.dtype).triu(1),
        lambda x, ids: x.new_zeros(4),
        lambda x, ids: x.new_tensor([1.0, 2.0]),
        lambda x, ids: torch.tensor(2.0, device=x.device),
        lambda x, ids: torch.zeros_like(x),
        lambda x, ids: (ids > 2).to(x.device),
        lambda x, ids: (ids > 2).to(x),
        lambda x, ids: ids.type_as(x),
        lambda x, ids: (ids[..., None] > 2).expand_as(x),
        lambda x, ids: torch.where(ids > 2, 0.0, torch.finfo(x.dtype).min),
    ],
)
def test_masks_and_constants_are_real(make) -> None:
    out = run(make)
    assert real(out)
    assert not out.is_meta


def test_constants_have_their_numbers() -> None:
    assert run(lambda x, ids: x.new_tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert run(lambda x, ids: (ids > 2).to(x)).tolist() == (IDS > 2).float().tolist()


def test_choices_are_spread_and_in_range() -> None:
    values, indices = run(lambda x, ids: torch.topk(x.flatten(0, 1), 2))
    assert is_shapeless(values)
    assert real(indices)
    assert sorted(set(indices.flatten().tolist())) == [*range(8)]
    assert all(len(set(row)) == 2 for row in indices.tolist())
    assert run(lambda x, ids: x.flatten(0, 1).argmax(-1)).tolist() == [*range(6)]
    assert run(lambda x, ids: x.argsort(-1)).tolist() == [[[*range(8)]] * 3] * 2
    assert run(lambda x, ids: x.max(0).indices).unique().tolist() == [0, 1]


def test_experts_in_a_loop_all_run() -> None:
    def experts(x: Tensor, ids: Tensor) -> Any:
        x = x.flatten(0, 1)
        scores, chosen = x[:, :4].softmax(-1).topk(2)
        mask = F.one_hot(chosen, 4).permute(2, 1, 0)
        out, ran = torch.zeros_like(x), []
        for number in mask.sum((-1, -2)).nonzero():
            place, token = torch.where(mask[number[0]])
            out.index_add_(0, token, x[token] * scores[token, place, None])
            ran.append(int(number))
        return out, ran

    out, ran = run(experts)
    assert ran == [0, 1, 2, 3]
    assert is_shapeless(out)


def test_writing_shapeless_numbers_into_a_real_tensor_makes_it_shapeless() -> None:
    def write(x: Tensor, ids: Tensor) -> Any:
        whole = torch.zeros(4, 8)
        before = whole.clone()
        view = whole[1:3]
        view[0] = x[0, 0]
        return whole, view, before, whole + 1

    whole, view, before, after = run(write)
    assert [is_shapeless(t) for t in (whole, view, before, after)] == [True, True, False, True]
    assert whole.shape == (4, 8)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, ids: x[ids > 1], (4, 8)),
        (lambda x, ids: x.masked_select((ids > 1)[..., None]), (32,)),
        (lambda x, ids: x[0].repeat_interleave(torch.tensor([2, 0, 3]), 0), (5, 8)),
        (lambda x, ids: torch.cat(x[0].tensor_split(torch.tensor([1]), 0)[1:]), (2, 8)),
        (lambda x, ids: x.masked_fill((ids > 1)[..., None], 0.0), (2, 3, 8)),
        (lambda x, ids: torch.zeros(2, 3, 8).masked_scatter((ids > 1)[..., None], x), (2, 3, 8)),
        (lambda x, ids: x.index_put((ids > 1,), torch.tensor(1.0)), (2, 3, 8)),
        (lambda x, ids: torch.zeros(6, 8).scatter_add(0, ids.flatten()[:, None].expand(6, 8), x.flatten(0, 1)), (6, 8)),
        (lambda x, ids: F.scaled_dot_product_attention(x, x, x, (ids > 0)[:, None]), (2, 3, 8)),
        (lambda x, ids: F.conv1d(x.mT, x.new_zeros(4, 8, 2)), (2, 4, 2)),
        (lambda x, ids: torch.linalg.inv(x[0] @ x[0].mT), (3, 3)),
        (lambda x, ids: pad_packed_sequence(pack_padded_sequence(x, torch.tensor([3, 2]), True))[0], (3, 2, 8)),
        (lambda x, ids: torch.fft.rfft(x).abs(), (2, 3, 5)),
        (lambda x, ids: torch.einsum("btd,bsd->bts", x, x), (2, 3, 3)),
    ],
)  # fmt: skip
def test_shapes_are_what_the_real_integers_make_them(function, shape) -> None:
    out = run(function)
    assert is_shapeless(out)
    assert tuple(out.shape) == shape


def test_control_flow_on_numbers_that_nobody_knows_goes_on() -> None:
    assert run(lambda x, ids: (float(x.sum()), bool(torch.isnan(x).any()), bool(x.sum() > 3))) == (1.0, False, False)
    assert run(lambda x, ids: x[0, 0].tolist()) == [1.0] * 8
    assert run(lambda x, ids: x.exp().round().long()).unique().tolist() == [1]
    assert run(lambda x, ids: torch.equal(x, x + 1)) is False
    assert run(lambda x, ids: bool((x * x >= 0).all())) is True
    assert run(lambda x, ids: str(x)) == "tensor(shape=(2, 3, 8), dtype=torch.float32, without numbers)"


def test_recurrent_layers() -> None:
    with torch.device("meta"):
        model = nn.LSTM(5, 4, batch_first=True)
    with shapeless(model), torch.inference_mode():
        out, (hidden, _) = model(torch.randn(2, 7, 5))
    assert out.shape == (2, 7, 4)
    assert hidden.shape == (1, 2, 4)
    assert is_shapeless(out)


def test_a_model_comes_back_as_it_was() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("places", torch.arange(4)[None].expand(2, 4).contiguous())
            self.loose = torch.ones(3)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) + self.loose, self.places, self.layer.weight.device

    with torch.device("meta"):
        model = Net()
    before = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    loose = model.loose
    with shapeless(model), torch.inference_mode():
        out, places, device = model(torch.ones(2, 3))
    assert (is_shapeless(out), places.tolist(), device) == (True, [[0, 1, 2, 3]] * 2, torch.device("cpu"))
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == before
    assert model.loose is loose
    assert all(t.device.type == "meta" for t in (*model.parameters(), model.places, model.loose))
    assert type(model.loose) is Tensor


class Built(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.large = nn.Linear(width, width)
        self.small = nn.LayerNorm(8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.small_weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("saved", torch.ones(3))
        self.register_buffer("computed", 1.0 / 10 ** torch.arange(0, 4).float(), persistent=False)
        self.register_buffer("triangle", torch.ones(4, 4, dtype=torch.bool).tril())
        self.register_buffer("single", torch.tensor(-1e4))


def test_a_blueprint_allocates_no_weights_and_computes_buffers() -> None:
    with blueprint():
        built = Built(1 << 20)
    model = without_weights(built)
    assert sum(p.numel() for p in model.parameters()) > 1e12
    assert all(p.is_meta and type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert model.tied.weight is model.small_weight
    assert model.saved.is_meta
    assert torch.allclose(model.computed, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert torch.equal(model.triangle, torch.ones(4, 4).tril().bool())
    assert model.single.item() == -1e4
    assert lacks_weights(model)


def test_tensors_too_large_to_be_real_stay_on_meta() -> None:
    with blueprint():
        huge = torch.ones(1 << 20, 1 << 20, dtype=torch.bool).tril()
        part = huge[None, :4, :4]
        masked = torch.where(part, 0.0, torch.full((4, 4), -1.0))
    assert [is_shapeless(t) for t in (huge, part, masked)] == [True] * 3
    assert (part.shape, masked.shape) == ((1, 4, 4), (1, 4, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: F.one_hot(ids, 10**9),
        lambda ids: torch.bincount(ids, minlength=10**9),
        lambda ids: torch.histc(ids.float(), bins=10**9, min=0, max=9),
    ],
)
def test_counts_that_would_fill_the_memory_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"was asked for [0-9,]+,000,000 numbers"), torch.inference_mode(), blueprint():
        make(torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_take_every_dtype(dtype) -> None:
    experts = nn.Parameter(torch.empty(4, 8, 16, device="meta", dtype=dtype))
    with shapeless(nn.ParameterList([experts])), torch.inference_mode():
        ends = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
        out = torch._grouped_mm(torch.randn(8, 8).to(dtype), experts, offs=ends)
    assert is_shapeless(out)
    assert (out.shape, out.dtype) == ((8, 16), dtype)
