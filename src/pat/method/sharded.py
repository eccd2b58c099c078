"""Parameters that an engine has spread over processes."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one; of one that is sharded (FSDP2) every process has to ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
