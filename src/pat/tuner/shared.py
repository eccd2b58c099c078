"""What the processes of a distributed run measure together; with one process nothing here does anything."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from pat import ranks


def share_from_first_process(*tensors: Tensor | None) -> None:
    """Overwrite tensors by those of the first process, in a distributed run."""
    # Each process rounds in its own way: with bases of their own they would average gradients of different functions.
    for tensor in tensors:
        if tensor is not None and ranks.connected():
            distributed.broadcast(tensor, src=0)


def sum_over_processes(*tensors: Tensor) -> None:
    """Overwrite tensors by their sums over the processes, in a distributed run."""
    for tensor in tensors:
        if ranks.connected():
            distributed.all_reduce(tensor)


def own_rows(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the rows of a batch that this process is to read, and whether there are any for it.

    Where there are none it gets the first one: in a sharded model a forward pass takes every process.
    """
    if not ranks.connected():
        return tensors, True
    num_rows = len(tensors["input_ids"])
    number, num_processes = distributed.get_rank(), distributed.get_world_size()
    start, stop = num_rows * number // num_processes, num_rows * (number + 1) // num_processes
    rows = slice(start, stop) if stop > start else slice(0, 1)
    return {name: tensor[rows] if len(tensor) == num_rows else tensor for name, tensor in tensors.items()}, stop > start


def total_over_processes(number: int, model: nn.Module) -> int:
    """Return the sum of the numbers that the processes have."""
    total = torch.tensor(number, device=next(model.parameters()).device)
    sum_over_processes(total)
    return int(total)
