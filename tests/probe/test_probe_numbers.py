"""Arguments of forward that are numbers: in a file, tensors of one entry stand for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.probe import open_probe


class Rated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, rate: int) -> Tensor:
        if rate != 16:
            raise ValueError(str(rate))
        return self.layer(x) * rate


@pytest.fixture(params=["eager", "script"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "eager":
        return Rated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return torch.jit.script(Rated())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_of_one_entry_is_the_number(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"x": torch.randn(10, 4), "rate": torch.full(shape, 16)}, tmp_path / "x.pt")
    if shape:
        with pytest.raises(ProbeError, match="disagree on the number of samples"):
            open_probe(str(tmp_path / "x.pt"), model, batch_size=4)
        return
    batches = list(open_probe(str(tmp_path / "x.pt"), model, batch_size=4))
    assert [(batch.samples, batch.args[1], type(batch.args[1])) for batch in batches] == [
        (4, 16, int), (4, 16, int), (2, 16, int),
    ]  # fmt: skip
    assert torch.cat([model(*batch.args) for batch in batches]).shape == (10, 2)


def test_without_a_probe_it_is_said_at_once(model: nn.Module) -> None:
    with pytest.raises(ProbeError) as caught:
        open_probe(None, model)
    assert str(caught.value) == (
        f"{type(model).__name__}.forward(x, rate) needs rate (int), which cannot be derived from the model; give --probe "
        "file.py:callable returning a dict of all arguments, or a file with a tensor for each"
    )


def test_a_file_of_numbers_alone_has_no_samples(tmp_path: Path) -> None:
    torch.save({"x": torch.tensor(1.0)}, tmp_path / "x.pt")
    with pytest.raises(ProbeError, match="has no sample axis"):
        open_probe(str(tmp_path / "x.pt"), nn.Linear(4, 2))
