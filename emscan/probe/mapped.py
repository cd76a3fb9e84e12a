"""Files that are mapped into memory: what a batch has read is handed back, so that a long probe stays small.

Pages of a mapped file count as the process's memory once they are read. Without a word the kernel keeps them until it
runs short, and the peak grows to the size of the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

from torch import Tensor

from emscan.probe.batch import Batch

_UNNEEDED = 4  # MADV_DONTNEED: the pages are read again from the file if they are needed again


class Pages:
    """The memory in which a file is mapped, by the kernel's own account; empty where there is none to ask."""

    def __init__(self, path: str) -> None:
        self._ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError, ValueError):
            wanted = Path(path).stat()
            device = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}"
            for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                place, _, _, where, inode, *_ = line.split(maxsplit=5)
                if int(inode) == wanted.st_ino and where == device:
                    low, high = (int(end, 16) for end in place.split("-"))
                    self._ranges.append((low, high))

    def release(self, batch: Batch) -> None:
        """Hand back the pages that the tensors of a batch lie in alone; memory that is no mapping stays untouched."""
        if not self._ranges:
            return
        for tensor in batch.tensors():
            self._release(tensor)

    def _release(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        low = tensor.data_ptr()
        high = low + tensor.numel() * tensor.element_size()
        page = mmap.PAGESIZE
        if not any(start <= low and high <= end for start, end in self._ranges):
            return
        low, high = -(-low // page) * page, high // page * page
        if low < high:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), _UNNEEDED)
