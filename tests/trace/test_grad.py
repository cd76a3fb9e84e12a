"""Blocks that stop gradients are told apart although the whole run is without."""

from __future__ import annotations

import torch
from torch import nn

from emscan.trace.grad import grad_mode, without_gradients


def test_blocks_calls_and_what_they_restore() -> None:
    seen: list[tuple[str, bool]] = []
    with without_gradients(nn.Identity()), grad_mode(nn.Identity()) as mode:

        def see(where: str) -> None:
            seen.append((where, mode.off))

        @torch.no_grad()
        def decorated() -> None:
            see("off")

        see("on")
        with torch.no_grad():
            see("off")
            with torch.enable_grad():
                see("on")
            with torch.set_grad_enabled(True):
                see("on")
            see("off")
            torch.set_grad_enabled(True)
            see("on")
            torch.set_grad_enabled(False)
            see("off")
        see("on")
        for block in (torch.set_grad_enabled(False), torch.inference_mode()):
            with block:
                pass
            see("on")
        with torch.set_grad_enabled(False):
            see("off")
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            see("off")
            torch.set_grad_enabled(before)
            see("off")
        see("on")
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        see("off")
        torch.set_grad_enabled(before)
        see("on")
        decorated()
        try:
            with torch.inference_mode():
                see("off")
                raise ValueError
        except ValueError:
            see("on")
    assert [off for _, off in seen] == [where == "off" for where, _ in seen]
    assert torch.is_grad_enabled()
    for cls in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.set_grad_enabled):
        assert cls.__enter__.__module__.startswith("torch")
