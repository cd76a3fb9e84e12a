"""A few thousand cases of the fuzzer; `python -m tests.hostile.fuzz` runs more."""

from __future__ import annotations

import sys

import pytest

from tests.hostile import fuzz

CASES = {"inspect": 40, "layers": 12, "config": 120, "folder": 120, "distributed": 120}
LOADERS = sorted(fuzz.RUNS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("loader", LOADERS)
def test_mutated_files_load_or_are_refused(loader):
    if loader in ("config", "folder"):
        pytest.importorskip("transformers")
    finds = fuzz.fuzz(loader, CASES.get(loader, 250), seed=0)
    assert not finds, "\n".join(map(str, finds))


def test_a_case_is_the_same_in_every_run():
    for loader in ("module", "safetensors", "layers"):
        assert fuzz.make(loader, 3, 7) == fuzz.make(loader, 3, 7)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_fuzzer_sees_what_it_looks_for(monkeypatch):
    import ctypes
    import faulthandler
    import os
    import time

    from emscan.errors import LoadError

    def lines(_):
        raise LoadError("two\x1b[31m lines")

    def crash(_):
        faulthandler.disable()  # its report would look like one of the tests'
        ctypes.string_at(0)

    attempts = {
        "ZeroDivisionError": lambda _: 1 / 0,
        "a message that is not one printable line": lines,
        "memory grew by ": lambda _: len(b"x" * (200 * 2**20)),
        "it ended the process (SIGSEGV)": crash,
        "it did os.system": lambda _: os.system("true"),
        "it hung for more than": lambda _: time.sleep(60),
    }
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for complaint, attempt in attempts.items():
        monkeypatch.setitem(fuzz.RUNS, "safetensors", attempt)
        ((_, found),) = fuzz.run("safetensors", [lambda: {"m.safetensors": b"x"}])
        assert found.startswith(complaint), found
