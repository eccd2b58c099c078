"""A matrix with a low-rank adapter on it, W + B A, of which a merge multiplies out only what it needs at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pat.surgery.precision import lift


@dataclass(frozen=True)
class AdaptedMatrix:
    """W + B A, not multiplied out: a large matrix in float32, twice written and read, is what a merge takes longest on.

    Shapes: n rows, m columns, r rank.
    """

    weight: Tensor
    """W, `(n, m)`, in the dtype it is stored in."""
    up: Tensor
    """B, `(n, r)`, with the adapter's scaling in it."""
    down: Tensor
    """A, `(r, m)`."""

    @property
    def shape(self) -> torch.Size:
        """`(n, m)`."""
        return self.weight.shape

    @property
    def mT(self) -> AdaptedMatrix:
        """The transpose, `(m, n)`."""
        return AdaptedMatrix(self.weight.mT, self.down.mT, self.up.mT)

    def to(self, precision: torch.dtype) -> AdaptedMatrix:
        """Return it with its factors in a precision; the weight is lifted when its rows are asked for."""
        return AdaptedMatrix(self.weight, lift(self.up, precision), lift(self.down, precision))

    def columns(self, select: Callable[[Tensor], Tensor]) -> AdaptedMatrix:
        """Return it with a choice of columns, by a function of rows `(..., m)`; those of the weight are still to do."""
        return AdaptedMatrix(self.weight, self.up, select(self.down))

    def rows(self, start: int, stop: int, select: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return rows `start` to `stop` multiplied out, `(stop - start, m)`, in the dtype of the factors.

        Args:
            start: the first row.
            stop: the one after the last.
            select: what `columns` was called with, if it was.
        """
        stored = self.weight[start:stop]
        rows = lift(stored, self.up.dtype)
        rows = rows if select is None else select(rows)
        rows = rows.clone() if rows.data_ptr() == stored.data_ptr() else rows
        return rows.addmm_(self.up[start:stop], self.down)  # in place: columns that lie one after another still do

    def merged(self) -> Tensor:
        """Return all of it in float32 or better, `(n, m)`."""
        dtype = torch.promote_types(torch.promote_types(self.weight.dtype, self.up.dtype), torch.float32)
        return self.weight.to(dtype, copy=True).addmm_(self.up.to(dtype), self.down.to(dtype))
