"""Meters of the memory that this process takes, now and at its highest, on a CPU or an accelerator."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""The value that Linux expects in `clear_refs` to start the highest resident size anew."""

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""Words of errors that have no type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory, of whatever device, did not suffice."""
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


class MemoryMeter:
    """Memory of this process on one device: what the allocator has given out, or the resident size on a CPU.

    The resident size includes mapped files that have been read, and the interpreter with its libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"

    @property
    def resets(self) -> bool:
        """Whether a peak is that since `reset`; if not, it is that of the process so far."""
        return not self._on_cpu or _CLEAR.exists()

    def reset(self) -> None:
        """Forget the peak so far, where the system allows it."""
        if not self._on_cpu:
            torch.accelerator.reset_peak_memory_stats(self._device)
        elif _CLEAR.exists():
            _CLEAR.write_text(_RESET_PEAK)

    def peak_bytes(self) -> int:
        """Return the highest amount since `reset`."""
        return _resident("VmHWM") if self._on_cpu else torch.accelerator.max_memory_allocated(self._device)

    def current_bytes(self) -> int:
        """Return the amount in use."""
        return _resident("VmRSS") if self._on_cpu else torch.accelerator.memory_allocated(self._device)


def _resident(field: str) -> int:
    """Read a size from Linux' account of this process; elsewhere only the highest so far can be had."""
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
