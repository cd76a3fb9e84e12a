"""What the first bytes of a file say about its format. No torch here."""

from __future__ import annotations

LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save pickled first before torch 1.6
_FIRST_OPCODES = b"(cl]}dIFLNSUVXKMJ)i"  # what a pickle without a protocol number may start with


def is_safetensors(head: bytes) -> bool:
    """Whether 8 bytes that are no text and no start of a pickle come before an opening brace."""
    size = head[:8]
    binary = any(byte < 9 or byte > 126 for byte in size)
    return head[8:9] == b"{" and binary and (size[0] != 0x80 or size[5:] == bytes(3))


def is_legacy(head: bytes) -> bool:
    """Whether the first pickle is torch's magic number."""
    return head[2:].startswith(LEGACY_MAGIC)


def is_pickle(head: bytes) -> bool:
    """Whether a pickle says its protocol, and is of no format that has a name."""
    known = is_legacy(head) or is_safetensors(head)
    return head[:1] == b"\x80" and len(head) > 2 and head[1] <= 5 and not known


def may_be_pickle(head: bytes, last: bytes) -> bool:
    """Whether the file may be a pickle of protocol 0 or 1, which only reading it to its end tells."""
    return head[:1] in {bytes([code]) for code in _FIRST_OPCODES} and last == b"."


def is_torchscript(inside: tuple[str, ...]) -> bool:
    """Whether an archive has constants, which every TorchScript archive has and torch.save never writes."""
    return "constants.pkl" in inside


def is_export(inside: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether an archive has torch.export's program, under its present or its former name."""
    return "archive_format" in inside or "serialized_exported_program.json" in (*inside, *names)


def is_checkpoint(inside: tuple[str, ...]) -> bool:
    """Whether an archive has a data.pkl and nothing of TorchScript."""
    return "data.pkl" in inside and not is_torchscript(inside)
