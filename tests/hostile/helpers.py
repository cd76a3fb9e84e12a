"""What the gallery shares: how a refusal is asked for, and bytes of pickles written by hand."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from unittest import mock

import pytest

from emscan.cli import main
from emscan.errors import LoadError
from emscan.load import load

HINT = (
    "save its weights alone (model.state_dict()) and name the architecture with --model, or pass --trust if you "
    "trust where the file comes from"
)
DAMAGED = "the file is damaged: copy or save it again"
DECEIVED = "the file is damaged or was made to deceive: save it again with torch.save"
SAFE_LIST = ", which is not on the safe list; " + HINT
LINEAR = "torch.nn.modules.linear.Linear"
PICKLE = b"\x80\x02}X\x01\x00\x00\x00wNs."
HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x10"  # LONG1 of 2**44


def refusal(path: str) -> str:
    start = time.perf_counter()
    with pytest.raises(LoadError) as caught:
        load(path)
    assert time.perf_counter() - start < 10
    text = str(caught.value)
    assert text.startswith(f"cannot load {path}: ")
    reason = text.removeprefix(f"cannot load {path}: ")
    assert reason.isprintable()
    return reason


def command(*arguments: str) -> tuple[int, str, list[str]]:
    """Run the command line in this process; return exit status, stdout and the lines of stderr."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", ["emscan", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue().splitlines()


def refused(*arguments: str) -> str:
    """Return the one line with which `emscan audit` fails, without its beginning."""
    start = time.perf_counter()
    status, out, err = command("audit", *arguments)
    lines = [line for line in err if not line.startswith("emscan: note: ")]
    assert status == 2, (status, out, err)
    assert not out
    assert len(lines) == 1, err
    assert lines[0].isprintable()
    assert time.perf_counter() - start < 60
    return lines[0].removeprefix("emscan: error: ")


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def glob(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


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
