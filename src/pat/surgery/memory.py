"""Memory for large tensors that are filled once and soon dropped, as a merge needs it all the time."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 2**22
"""Bytes from which it matters; a large page has 2 MB."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return an uninitialised tensor, a large one on the CPU in large pages where the system has them on request.

    Fresh memory is cleared page by page when it is first touched. With pages of 4 kB that takes as long as filling it.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
