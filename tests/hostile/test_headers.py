"""Headers of safetensors that lie."""

from __future__ import annotations

import struct

from tests.hostile.helpers import DAMAGED, refusal


def test_safetensors_headers(written):
    def message(data: bytes) -> str:
        return refusal(written(data, "m.safetensors"))

    size = len(b"{}" * 3)
    assert message(struct.pack("<Q", 2**62) + b"{}" * 3) == (
        f"its header claims {2**62:,} bytes, more than the file has; {DAMAGED}"
    )
    assert message(struct.pack("<Q", size) + b"{}" * 3) == (
        f"its header is malformed (its JSON is followed by other characters); {DAMAGED}"
    )
    for entry in (
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"??","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    ):
        text = message(struct.pack("<Q", len(entry)) + entry + bytes(4))
        assert text.startswith(("its header is malformed (", "its tensors need 32 bytes more than the file has"))
        assert text.endswith(DAMAGED)
    assert message(struct.pack("<Q", 2) + b"{}") == "it holds no tensors; save a module or its state_dict"
