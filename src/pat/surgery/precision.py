"""float64 on every device: where exactness is decided, and sums over many tokens or layers."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Device types without the type; Apple's raises on a mere conversion."""


def to_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its own device or, if that cannot hold it, on the CPU."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).double()


def lift(tensor: Tensor, precision: torch.dtype) -> Tensor:
    """Return a tensor in a precision, see `to_float64` for where it then lies."""
    return to_float64(tensor) if precision == torch.float64 else tensor.to(precision)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Return a context in which operations on a tensor's device keep the precision that they are given."""
    return torch.autocast(tensor.device.type, enabled=False)
