"""The layout of a model's parameters in its checkpoint: transformers stores some otherwise than it holds them.

The experts of a layer are one parameter in memory and one tensor each on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pat.surgery.residual import model_tensors


@dataclass(frozen=True)
class Piece:
    """A stored tensor: consecutive rows of a parameter."""

    name: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    start: int
    """Its first element, counted in the flattened parameter."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class UnknownLayoutError(Exception):
    """A model is stored in a way that is not a mere cutting up of its parameters into rows."""


def stored_layout(model: PreTrainedModel) -> dict[str, tuple[Piece, ...]]:
    """Return what each parameter and persistent buffer is stored as, in order, by its name in the model.

    A shared parameter is there once.

    Raises:
        UnknownLayoutError: one is stored other than as blocks of its rows.
    """
    # transformers converts numbers of rows in place of rows, and tells with that which ones go where.
    offsets: dict[str, int] = {}
    numbers: dict[str, torch.Tensor] = {}
    total = 0
    tensors = model_tensors(model)
    for name, tensor in tensors.items():
        *stack, _ = tensor.shape or (1,)
        num_rows = torch.Size(stack).numel()
        numbers[name] = torch.arange(total, total + num_rows).view(*stack, 1)
        offsets[name] = total
        total += num_rows
    owners = [(offset, name) for name, offset in offsets.items()]
    layout: dict[str, list[Piece]] = {name: [] for name in tensors}
    for stored, rows in revert_weight_conversion(model, numbers).items():
        flat = rows.flatten()
        first = int(flat[0])
        offset, name = max(owner for owner in owners if owner[0] <= first)
        if rows.shape[-1] != 1 or not torch.equal(flat, torch.arange(first, first + len(flat))):
            raise UnknownLayoutError(f"{name} is stored as {stored} in another order")
        row = tensors[name].shape[-1:]  # empty for a single number
        layout[name].append(Piece(stored, (*rows.shape[:-1], *row), (first - offset) * row.numel()))
    for name, pieces in layout.items():
        if sum(piece.numel for piece in pieces) != tensors[name].numel():
            raise UnknownLayoutError(f"{name} is not stored as a whole")
    return {name: tuple(sorted(pieces, key=lambda piece: piece.start)) for name, pieces in layout.items()}
