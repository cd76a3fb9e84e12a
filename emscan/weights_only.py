"""What can be said of tensors without an architecture: from their numbers exactly, from their shapes as hints.

Rows are compared bit for bit: a 64-bit hash of each finds candidates, which are then compared themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from emscan.report.document import Copies, Hint, NotFinite, Rows, WeightsOnly

_SHORTEST = 8  # numbers in a row from which two equal ones are no coincidence
_AT_A_TIME = 1 << 18  # numbers looked at together
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # joins the hashes of the parts of a row
_EXPERTS = 2  # groups of equal shape, at least, that could be experts
_CODES = 16  # vectors in a table, at least, that could be codes


def examine(weights: Mapping[str, Tensor], command: str = "") -> WeightsOnly:
    """Return what the tensors say by themselves. ``command``: what to try next."""
    found = WeightsOnly(
        len(weights),
        sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values())),
        command=command,
    )
    whole: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in weights.items():
        if tensor.is_floating_point() or tensor.is_complex():
            bad = _not_finite(name, tensor)
            found.not_finite += [bad] if bad is not None else []
        hashes = _hashes(tensor)
        if tensor.numel() >= _SHORTEST:
            whole[(tensor.dtype, tuple(tensor.shape), int(_mixed(hashes[None])[0]))].append(name)
        if tensor.is_floating_point() and tensor.dim() >= 2 and tensor.shape[0] > 1:
            zero = _zero_rows(tensor)
            found.zero_rows += [Rows(name, len(tensor), zero)] if zero else []
            groups = sorted(_equal_rows(tensor, hashes, set(zero)))
            found.duplicate_rows += [Copies(name, len(tensor), groups)] if groups else []
    for names in whole.values():
        same = [name for name in names if _equal(weights[name], weights[names[0]])]
        found.equal_tensors += [same] if len(same) > 1 and bool((weights[same[0]] != 0).any()) else []
    found.hints = [*_routers(weights), *_tables(weights)]
    return found


# -- numbers ------------------------------------------------------------------------------------------------------


def _flat(tensor: Tensor) -> Tensor:
    """Return the tensor as rows that can be told apart, (rows, numbers of one); else as one row."""
    many = tensor.dim() >= 2 and tensor[0].numel() >= _SHORTEST if tensor.numel() else False
    return tensor.detach().reshape(tensor.shape[0] if many else 1, -1)


def _bytes(numbers: Tensor) -> Tensor:
    """Return rows of numbers as rows of bytes."""
    return numbers.contiguous().view(torch.uint8) if numbers.numel() else numbers.new_empty(len(numbers), 0)


def _pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row of, and some numbers of some rows at a time: (rows, numbers)."""
    rows = _flat(tensor)
    together = max(1, _AT_A_TIME // max(1, rows.shape[1]))
    for start in range(0, len(rows), together):
        for piece in rows[start : start + together].split(_AT_A_TIME, 1):
            yield start, piece


def _hashes(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of the bytes of each row."""
    found = torch.zeros(len(_flat(tensor)), dtype=torch.int64)
    for start, piece in _pieces(tensor) if tensor.numel() else ():
        data = _bytes(piece)
        padded = torch.nn.functional.pad(data, (0, -data.shape[1] % 8)).contiguous()
        place = found[start : start + len(piece)]
        place.copy_(place * _ODD + _mixed(padded.view(torch.int64)))
    return found


def _mixed(words: Tensor) -> Tensor:
    """Return one word for each row of words, by products with odd random numbers (multiply-shift), modulo 2^64."""
    draw = torch.Generator().manual_seed(0x5EED)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=draw) * 2 + 1
    return ((words ^ (words >> 29)) * factors).sum(1)


def _zero_rows(tensor: Tensor) -> list[int]:
    """Return the rows that are all zero."""
    rows = tensor.detach().reshape(len(tensor), -1)
    step = max(1, _AT_A_TIME // max(1, rows.shape[1]))
    zero = [(piece == 0).all(1) for piece in rows.split(step)] if tensor.numel() else []
    return torch.cat(zero).nonzero().flatten().tolist() if zero else []


def _equal_rows(tensor: Tensor, hashes: Tensor, left: set[int]) -> Iterator[list[int]]:
    """Yield groups of rows that equal each other bit for bit, without those in ``left``."""
    if tensor[0].numel() < _SHORTEST:
        return
    order = hashes.argsort(stable=True)
    _, counts = hashes[order].unique_consecutive(return_counts=True)
    for group in order.split(counts.tolist()):
        rows = [row for row in group.tolist() if row not in left] if len(group) > 1 else []
        while len(rows) > 1:
            same = [row for row in rows if _equal(tensor[row], tensor[rows[0]])]
            if len(same) > 1:
                yield same
            rows = [row for row in rows if row not in same]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bytes(_flat(a)), _bytes(_flat(b)))


def _not_finite(name: str, tensor: Tensor) -> NotFinite | None:
    nan = inf = 0
    for _, piece in _pieces(tensor) if tensor.numel() else ():
        wide = piece if piece.dtype.itemsize > 1 else piece.float()
        if not bool(wide.isfinite().all()):
            nan += int(wide.isnan().sum())
            inf += int(wide.isinf().sum())
    return NotFinite(name, nan, inf) if nan or inf else None


# -- shapes -------------------------------------------------------------------------------------------------------


def _routers(weights: Mapping[str, Tensor]) -> Iterator[Hint]:
    """Yield matrices of E rows beside E parts that are alike, by their numbers or by a leading axis."""
    parts = _numbered(weights)
    stacks = [(name, tensor) for name, tensor in weights.items() if tensor.dim() == 3]
    for name, tensor in weights.items():
        if tensor.dim() != 2 or not tensor.is_floating_point() or len(tensor) < _EXPERTS:
            continue
        block = _scope(_scope(name))  # a router and its experts are parts of one
        count, width = tensor.shape
        alike = next((place for place, number in parts.items() if number == count and _scope(place) == block), None)
        if alike is not None:
            yield Hint(name, [*tensor.shape], "router", f"{count} rows beside {count} parts that are alike ({alike}.*)")
            continue
        stacked = next(
            (n for n, t in stacks if n.startswith(f"{block}.") and len(t) == count and width in t.shape), None
        )
        if stacked is not None:
            shape = " x ".join(map(str, weights[stacked].shape))
            yield Hint(name, [*tensor.shape], "router", f"{count} rows beside {stacked} of {shape}")


def _numbered(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, by prefix, how many parts numbered 0 to E - 1 there are whose tensors have equal names and shapes."""
    parts: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in weights.items():
        pieces = name.split(".")
        for at, piece in enumerate(pieces):
            if piece.isdecimal() and len(piece) < 6 and 0 < at < len(pieces) - 1:
                parts[".".join(pieces[:at])][int(piece)].append((".".join(pieces[at + 1 :]), tuple(tensor.shape)))
    return {
        place: len(numbered)
        for place, numbered in parts.items()
        if len(numbered) >= _EXPERTS
        and set(numbered) == set(range(len(numbered)))
        and len({tuple(sorted(content)) for content in numbered.values()}) == 1
    }


def _tables(weights: Mapping[str, Tensor]) -> Iterator[Hint]:
    """Yield matrices of K vectors that have no bias beside them, and what their running counts and sums speak for."""
    beside: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in weights.items():
        beside[_scope(name)].append((name, tensor))
    for name, tensor in weights.items():
        if tensor.dim() != 2 or not tensor.is_floating_point() or len(tensor) < _CODES:
            continue
        others = [(n, t) for n, t in beside[_scope(name)] if n != name]
        counts = next((n for n, t in others if tuple(t.shape) == (len(tensor),) and bool((t >= 0).all())), None)
        sums = next((n for n, t in others if t.shape == tensor.shape), None)
        if counts is not None and sums is not None and name < sums:
            why = f"{len(tensor)} vectors beside {_last(counts)} (a number for each, none negative) and {_last(sums)} (alike)"
            yield Hint(name, [*tensor.shape], "codebook with running averages", why)
        elif not others and len(tensor) > tensor.shape[1]:
            why = f"{len(tensor)} vectors of {tensor.shape[1]} numbers, nothing beside them"
            yield Hint(name, [*tensor.shape], "embedding, codebook or layer without bias", why)


def _scope(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
