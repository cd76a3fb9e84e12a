"""Mutations that know the structure of a file, so that what they change is reached by a parser and not by a checksum."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

BOUNDARIES = (
    0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 200, 255, 256, 1000, 32767, 32768, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 10**9, 10**12, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
)  # fmt: skip
PLAIN_PICKLE = b"\x80\x02}X\x01\x00\x00\x00wNs."
VALUES: tuple[Any, ...] = (
    *BOUNDARIES, -1, -2, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), True,
    False, None, "", "a", "../x", "/etc/passwd", "x\0y", "\x1b[31m\n", "\ud800", "é" * 3, "a" * 5000, "relu", "cuda", "float16",
    [], {}, [[]], [0], [1, 2], {"a": 1}, [2**63, 2**63], ["model.safetensors"], "model.safetensors",
)  # fmt: skip
NAMES = (
    "os system", "builtins eval", "builtins getattr", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage", "torch._utils _rebuild_parameter", "torch.nn.modules.linear Linear", "torch float32", "torch Size",
    "torch.nn.modules.container Sequential", "torch.nn.modules.rnn LSTM", "torch.nn.functional relu", "torch Tensor",
    "torch.storage UntypedStorage", "torch.serialization _get_layout", "_codecs encode", "builtins set", "torch device",
    "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter", "__main__ X", "torch._utils _rebuild_tensor_v3",
    "torch.nn.modules.activation MultiheadAttention", "torch.nn.modules.padding ConstantPad2d", "builtins complex",
)  # fmt: skip


def flip(data: bytes, rng: Random) -> bytes:
    """Change a few bits or bytes, or a stretch of them."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if changed:
            place = rng.randrange(len(changed))
            changed[place] = rng.choice((changed[place] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    """Cut the end off, a piece out, or repeat a piece."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice(
        (data[:end], data[start:], data[:start] + data[end:], data[:end] + data[start:], data + data[start:end])
    )


def number(data: bytes, rng: Random) -> bytes:
    """Write a boundary value over one, two, four or eight bytes."""
    size = rng.choice((1, 2, 4, 8))
    place = rng.randrange(max(1, len(data) - size))
    value = rng.choice(BOUNDARIES) % 256**size
    return data[:place] + value.to_bytes(size, rng.choice(("little", "little", "big"))) + data[place + size :]


def splice(data: bytes, other: bytes, rng: Random) -> bytes:
    """Join the beginning of one file to the end of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def plain(data: bytes, other: bytes, rng: Random) -> bytes:
    """Mutate bytes of which nothing is known."""
    kind = rng.randrange(8)
    if kind == 0:
        return splice(data, other, rng)
    return (flip, flip, flip, cut, cut, number, number)[kind - 1](data, rng)


# -- JSON ------------------------------------------------------------------------------------------------------------


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside ``value``."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, inner in pairs:
            found.append((item, key))
            waiting.append(inner)
    return found


def _change(places: list[tuple[Any, Any]], rng: Random) -> None:
    container, key = rng.choice(places)
    others, other = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = copy.deepcopy(others[other])
    elif kind == 2 and isinstance(container, dict):
        container[str(rng.choice((other, "", "model_type", "__metadata__", "x" * 3000, "\ud800")))] = container[key]
    elif kind == 3 and isinstance(container[key], int):
        container[key] += rng.choice((1, -1, 2**32, -(2**32)))
    else:
        container[key] = rng.choice(VALUES)


def text_of_json(data: bytes, rng: Random) -> bytes:
    """Change values, keys or the text of a JSON document."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return flip(data, rng)
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice((b"[", b'{"a":')) * rng.choice((100, 1000, 100_000)) + data
    if kind == 1 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return data.rstrip()[:-1] + f",{json.dumps(key)}:{json.dumps(rng.choice(VALUES))}}}".encode()
    if kind == 2:
        return plain(data, b'{"a":[1e999,-0,"\\ud800",NaN]}', rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(value)
        if places:
            try:
                _change(places, rng)
            except (KeyError, IndexError):  # removed by the change before
                continue
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a value put into itself
        return flip(data, rng)


# -- safetensors, NumPy ----------------------------------------------------------------------------------------------


def safetensors(data: bytes, other: bytes, rng: Random) -> bytes:
    """Change the header's JSON and keep its length right, mostly."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.25 or length > len(data) - 8:
        return plain(data, other, rng)
    header = text_of_json(data[8 : 8 + length], rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice(BOUNDARIES) % 2**64
    rest = data[8 + length :]
    return claimed.to_bytes(8, "little") + header + (rest if rng.random() < 0.9 else cut(rest, rng))


_DESCRIPTIONS = (
    "<f4",
    ">f8",
    "|O",
    "<U9999999",
    "|V8",
    "<M8[s]",
    "|b1",
    "<c16",
    "<f2",
    "|S0",
    "<i8",
    "<u8",
    "<f16",
    "O",
    "",
)


def npy(data: bytes, other: bytes, rng: Random) -> bytes:
    """Change what the header of an .npy file claims."""
    if rng.random() < 0.3:
        return plain(data, other, rng)
    shape = ",".join(str(rng.choice((*BOUNDARIES, -1))) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 40))))
    shape = rng.choice((f"({shape},)", f"({shape},)", f"[{shape}]", "(" * 300 + ")" * 300, "(True,)", "(1.5,)", "()"))
    text = (
        f"{{'descr': {rng.choice(_DESCRIPTIONS)!r}, 'fortran_order': {rng.choice((True, False, 1))}, 'shape': {shape}}}"
    )
    text = rng.choice((text, text, text, text[:-1], text + " " * 70_000))
    header = flip(text.encode(), rng) if rng.random() < 0.2 else text.encode()
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x00\x01"))
    size = struct.pack("<H", len(header) % 65536) if version == b"\x01\x00" else struct.pack("<I", len(header))
    return b"\x93NUMPY" + version + size + header + data[-rng.randrange(1, 200) :]


# -- pickles ---------------------------------------------------------------------------------------------------------


def _instruction(rng: Random) -> bytes:
    """Return one instruction with an argument, of any protocol."""
    value = rng.choice(BOUNDARIES)
    name = rng.choice(NAMES).split()
    text = rng.choice((name[0], "x", "\x1b]0;", "storage", "cpu", "weight")).encode()
    return rng.choice((
        b"(", b"]", b"}", b")", b"N", b"\x88", b"\x89", b"0", b"1", b"2", b"R", b"b", b"\x81", b"Q", b"a", b"e", b"s", b"u",
        b"t", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x92", b"o", b".", b"\x94", b"\x97", b"\x98",
        b"c" + name[0].encode() + b"\n" + name[1].encode() + b"\n", b"i" + name[0].encode() + b"\n" + name[1].encode() + b"\n",
        b"K" + bytes([value % 256]), b"M" + struct.pack("<H", value % 2**16), b"J" + struct.pack("<I", value % 2**32),
        b"\x8a\x08" + struct.pack("<Q", value % 2**64), b"\x8a\xff" + b"\x7f" * 255, b"\x8b" + struct.pack("<I", value % 2**32),
        b"I" + str(value).encode() + b"\n", b"L" + str(value).encode() + b"L\n", b"F1e999\n",
        b"G" + struct.pack(">Q", value % 2**64),
        b"X" + struct.pack("<I", len(text)) + text, b"X" + struct.pack("<I", value % 2**32), b"\x8c" + bytes([len(text)]) + text,
        b"h" + bytes([value % 256]), b"q" + bytes([value % 256]), b"r" + struct.pack("<I", value % 2**32),
        b"j" + struct.pack("<I", value % 2**32), b"\x80" + bytes([rng.randrange(8)]), b"\x82\x01", b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00", b"\x95" + struct.pack("<Q", value % 2**64), b"P1\n", b"Vtext\n", b"S'x'\n", b"p7\n", b"g7\n",
        b"\x96" + struct.pack("<Q", value % 2**64), b"B" + struct.pack("<I", value % 2**32), b"C\x01a", b"U\x01a",
    ))  # fmt: skip


def pickled(data: bytes, other: bytes, rng: Random, start: int = 0) -> bytes:
    """Delete, repeat, exchange, replace or insert instructions, or change their arguments."""
    places = []
    try:
        stream = io.BytesIO(data)
        stream.seek(start)
        places = [place for _, _, place in pickletools.genops(stream)]
    except Exception:  # broken off by an earlier change
        pass
    if len(places) < 4 or rng.random() < 0.2:
        return plain(data, other, rng)
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    tail = data[places[-1] :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(pieces))
        _edit(pieces, place, rng)
        pieces = pieces or [b""]
    return data[:start] + b"".join(pieces) + tail


def _edit(pieces: list[bytes], place: int, rng: Random) -> None:
    kind = rng.randrange(9)
    if kind == 0:
        del pieces[place]
    elif kind == 1:
        pieces.insert(place, pieces[rng.randrange(len(pieces))])
    elif kind == 2:
        other = rng.randrange(len(pieces))
        pieces[place], pieces[other] = pieces[other], pieces[place]
    elif kind == 3:
        pieces[place] = _instruction(rng)
    elif kind == 4:
        pieces.insert(place, _instruction(rng))
    elif kind == 5:
        pieces[place] = pieces[place] * rng.choice((2, 10, 300))
    else:
        numbers = [index for index, piece in enumerate(pieces) if piece[:1] in (b"K", b"M", b"J", b"\x8a")]
        if numbers:
            value = rng.choice((*BOUNDARIES, -1, -2, -(2**31), -(2**63))) % 2**64
            pieces[rng.choice(numbers)] = b"\x8a\x08" + struct.pack("<Q", value)


# -- zip archives ----------------------------------------------------------------------------------------------------


def archive(data: bytes, other: bytes, rng: Random, inner: Callable[..., bytes] = pickled) -> bytes:
    """Change one entry of a zip archive, the list of its entries, or the fields of its directory."""
    kind = rng.randrange(10)
    if kind == 0:
        return plain(data, other, rng)
    if kind in (1, 2):
        return _field(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            entries = [[info.filename, source.read(info), zipfile.ZIP_STORED] for info in source.infolist()]
    except Exception:  # a file that an earlier change has broken
        return plain(data, other, rng)
    if not entries:
        return flip(data, rng)
    if kind == 3:
        _entries(entries, rng)
    else:
        likely = [entry for entry in entries if entry[0].endswith((".pkl", ".npy"))] or entries
        entry = rng.choice(likely if likely and rng.random() < 0.9 else entries)
        entry[1] = inner(entry[1], other, rng) if entry in likely else plain(entry[1], other, rng)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as target:
        warnings.simplefilter("ignore")
        for name, content, method in entries:
            target.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def _entries(entries: list[list[Any]], rng: Random) -> None:
    place = rng.randrange(len(entries))
    kind = rng.randrange(6)
    if kind == 0:
        del entries[place]
    elif kind == 1:
        entries.append(list(entries[place]))
    elif kind == 2:
        names = (
            "archive/constants.pkl",
            "x/../../y",
            "archive/data/0",
            "archive/data.pkl",
            "archive_format",
            "a\\b",
            "/x",
        )
        entries[place][0] = rng.choice(names)
    elif kind == 3:
        entries[place][2] = zipfile.ZIP_DEFLATED
    elif kind == 4:
        entries[place][1] = bytes(rng.choice((0, 10**6, 10**7)))
        entries[place][2] = zipfile.ZIP_DEFLATED
    else:
        rng.shuffle(entries)


def _field(data: bytes, rng: Random) -> bytes:
    """Write a boundary value into a local header, a directory entry or the end record."""
    found = []
    for magic, size in ((b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22)):
        place = data.find(magic)
        while place >= 0:
            found.append((place, size))
            place = data.find(magic, place + 4)
    if not found:
        return flip(data, rng)
    place, size = rng.choice(found)
    width = rng.choice((2, 4))
    at = place + rng.randrange(4, size - width + 1, 2)
    return data[:at] + (rng.choice(BOUNDARIES) % 256**width).to_bytes(width, "little") + data[at + width :]


def npz(data: bytes, other: bytes, rng: Random) -> bytes:
    """Change an archive of arrays."""
    return archive(data, other, rng, npy)


def json_file(data: bytes, other: bytes, rng: Random) -> bytes:
    """Change a JSON document."""
    return text_of_json(data, rng)
