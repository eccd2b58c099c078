"""A stand-in for a device that has no float64 (Apple's): there even a conversion to it is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoFloat64(TorchFunctionMode):
    """Refuse `double()` of a tensor in another dtype unless it has been moved by `cpu()` just before."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            moved = args[0].clone()
            moved.is_on_the_cpu = True
            return moved
        if func is Tensor.double and args[0].dtype != torch.float64 and not hasattr(args[0], "is_on_the_cpu"):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return func(*args, **(kwargs or {}))
