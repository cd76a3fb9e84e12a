"""Numbers as people write them, and counts with their noun."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: int | None) -> str:
    """Return bytes in units of a thousand, three digits: 1.23 GB."""
    return "-" if count is None else _scaled(count, ("bytes", "kB", "MB", "GB", "TB", "PB", "EB"))


def number(count: int) -> str:
    """Return a count in short: 7.24 B."""
    return _scaled(count, ("", "k", "M", "B", "T"))


def _scaled(count: int, units: Sequence[str]) -> str:
    if count < 10_000:
        return f"{count:,} {units[0]}".rstrip()
    value, step = float(count), 0
    while value >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[step]}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def shape(sizes: Sequence[int] | None) -> str:
    """Return a shape: 768 x 3072."""
    if sizes is None:
        return "?"
    return " x ".join(map(str, sizes)) if sizes else "scalar"
