"""Which tensor goes to which parameter of forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.probe import forward_parameters
from emscan.probe.signature import match_named, match_ordered, signature


class Takes(nn.Module):
    """forward(x, mask, scale=1.0, bias=None)."""

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        return x * mask * scale if bias is None else x + bias


class Optional(nn.Module):
    def forward(self, input_ids=None, attention_mask=None, labels=None, *, inputs_embeds=None):
        return inputs_embeds if input_ids is None else input_ids


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        return args[0]


class Extras(nn.Module):
    def forward(self, x, **kwargs):
        return x


X, M, Y = torch.zeros(4, 3), torch.ones(4, 3), torch.arange(4)


def named(module: nn.Module, **tensors: Tensor):
    return match_named(tensors, signature(module), "the probe")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parameters_of_modules_scripts_traces_and_exports():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left) + self.fc(right)

    assert forward_parameters(Takes()) == ["x", "mask", "scale", "bias"]
    assert forward_parameters(nn.Sequential(nn.Linear(3, 2))) == ["input"]
    assert forward_parameters(nn.DataParallel(Takes())) == ["x", "mask", "scale", "bias"]
    assert forward_parameters(Anything()) == []
    assert forward_parameters(torch.jit.script(Takes())) == ["x", "mask", "scale", "bias"]
    assert forward_parameters(torch.jit.trace(Two(), (X, M))) == ["left", "right"]
    program = torch.export.export(Two().eval(), (X,), {"right": M})
    exported = signature(program.module())
    assert [(p.name, p.keyword_only) for p in exported.parameters] == [("left", False), ("right", True)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_defaults_decide_what_a_tensor_may_fill():
    assert [p.fillable for p in signature(torch.jit.script(Takes())).parameters] == [True, True, False, True]
    assert [p.fillable for p in signature(Takes()).parameters] == [True, True, False, True]


def test_names_win_over_order():
    call = named(Takes(), mask=M, x=X)
    assert call.args[0] is X
    assert call.args[1] is M


def test_a_gap_becomes_a_keyword():
    call = named(Takes(), x=X, mask=M, bias=M)
    assert len(call.args) == 2
    assert list(call.kwargs) == ["bias"]


def test_unknown_names_go_by_order_and_skip_what_is_no_tensor():
    call = named(Takes(), a=X, b=M, c=X)
    assert call.args == (X, M) or (call.args[0] is X and call.args[1] is M)
    assert call.kwargs["bias"] is X


def test_one_tensor_goes_first_whatever_its_name():
    for name in ("images", "targets", "y", "attention_mask"):
        assert named(nn.Linear(3, 2), **{name: X}).args == (X,)
    assert named(nn.Linear(3, 2), images=X, labels=Y).args == (X,)


def test_one_tensor_whose_name_completes_the_call_goes_there():
    assert named(Optional(), inputs_embeds=X).kwargs == {"inputs_embeds": X}
    assert named(Optional(), pixels=X).args == (X,)


@pytest.mark.parametrize("name", ["targets", "target", "labels", "label", "y"])
def test_targets_go_to_the_objective(name):
    call = named(nn.Linear(3, 2), x=X, **{name: Y})
    assert call.targets is Y
    assert call.args == (X,)


def test_targets_that_forward_takes_stay_there():
    call = named(Optional(), input_ids=X, labels=Y)
    assert call.targets is None
    assert call.kwargs == {"labels": Y}


def test_variadic_forwards():
    assert [item is want for item, want in zip(named(Anything(), b=X, a=M).args, (X, M), strict=True)] == [True, True]
    call = named(Extras(), x=X, extra=M)
    assert call.args == (X,)
    assert call.kwargs == {"extra": M}
    assert named(Extras(), images=X, weights=M).args == (X,)


@pytest.mark.parametrize(
    ("module", "tensors", "message"),
    [
        (Takes(), {"x": X, "targets": Y}, "the probe holds x, targets, but forward(x, mask, scale=..., bias=...)"),
        (nn.Linear(3, 2), {"a": X, "b": M}, "the probe holds a, b, more than forward(input) takes"),
        (nn.Linear(3, 2), {"targets": Y, "labels": Y, "a": X}, "more than forward(input) takes"),
        (nn.Linear(3, 2), {}, "holds no tensors"),
    ],
)
def test_misfits_are_one_clear_line(module, tensors, message):
    with pytest.raises(ProbeError) as error:
        named(module, **tensors)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_order_alone():
    assert match_ordered([X, M], signature(Takes()), "the probe").args[1] is M
    with pytest.raises(ProbeError, match="also needs mask"):
        match_ordered([X], signature(Takes()), "the probe")
