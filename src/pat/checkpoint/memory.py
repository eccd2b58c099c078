"""Memory that is used again: what the system gives a process it clears first, and a merge asks for fifty gigabytes."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

SMALLEST_BYTES = 2**22
"""What is smaller the C library soon keeps for itself, and hands out again."""

ALIGNMENT = 64
"""Of the first byte: a line of the processor's cache, as torch has it."""


class ReusedMemory:
    """Tensors on the CPU, in memory that returns here when the last tensor that shares it is gone.

    What the C library is asked for in large pieces it asks the system for, and gives back at once; clearing those pages
    again and again took a third of the processor time of merging.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a contiguous tensor of undefined content."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or num_bytes < SMALLEST_BYTES:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        block = self._take(num_bytes + ALIGNMENT)
        start = -block.ctypes.data % ALIGNMENT
        lease = block[start : start + num_bytes]
        # A tensor keeps the array it was made from, with all its views, until its memory is not needed any more.
        returning = weakref.finalize(lease, self._free.append, block)
        returning.atexit = False
        return torch.from_numpy(lease).view(dtype).view(tuple(shape))

    def clear(self) -> None:
        """Give back what is not in use."""
        self._free.clear()

    def _take(self, num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        fitting = [index for index, block in enumerate(self._free) if block.nbytes >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        self.clear()  # too small, all of them: they would only add to the peak
        return np.empty(num_bytes, dtype=np.uint8)


def return_freed_memory() -> None:
    """Have the C library give back what is free in its heap: after an adapter is loaded, hundreds of megabytes."""
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
