"""A matrix with a low-rank adapter on it, W + s B A, of which a merge multiplies out only what it needs at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pat.surgery.precision import lift


@dataclass(frozen=True)
class AdaptedMatrix:
    """W + s B A, not multiplied out: a large matrix in float32, twice written and read, is slower than the arithmetic.

    Shapes: n rows, m columns, r rank.
    """

    weight: Tensor
    """W, `(n, m)`, in the dtype it is stored in."""
    up: Tensor
    """B, `(n, r)`."""
    down: Tensor
    """A, `(r, m)`."""
    scaling: float
    """s."""
    select: Callable[[Tensor], Tensor] | None = None
    """A choice of columns, as a function of rows `(..., m)` that copies them; `down` has those columns alone."""

    @property
    def shape(self) -> torch.Size:
        """`(n, m)`, before columns were chosen."""
        return self.weight.shape

    @property
    def mT(self) -> AdaptedMatrix:
        """The transpose, `(m, n)`."""
        assert self.select is None, "choose columns last"
        return AdaptedMatrix(self.weight.mT, self.down.mT, self.up.mT, self.scaling)

    def to(self, precision: torch.dtype) -> AdaptedMatrix:
        """Return it with its factors in a precision; the weight is lifted when its rows are asked for."""
        return replace(self, up=lift(self.up, precision), down=lift(self.down, precision))

    def columns(self, select: Callable[[Tensor], Tensor]) -> AdaptedMatrix:
        """Return it with a choice of columns, by a function that copies those of rows `(..., m)`."""
        return replace(self, down=select(self.down), select=select)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` multiplied out, `(stop - start, m)`, in the dtype of the factors."""
        stored = self.weight[start:stop]
        rows = lift(stored, self.up.dtype)
        if self.select is not None:
            rows = self.select(rows)
        elif rows.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr():
            rows = rows.clone()
        # In place: columns that lie one after another still do.
        return rows.addmm_(self.up[start:stop], self.down, alpha=self.scaling)

    def merged(self) -> Tensor:
        """Return all of it in float32 or better, `(n, m)`."""
        assert self.select is None, "choose columns of the result"
        dtype = torch.promote_types(torch.promote_types(self.weight.dtype, self.up.dtype), torch.float32)
        return self.weight.to(dtype, copy=True).addmm_(self.up.to(dtype), self.down.to(dtype), alpha=self.scaling)


def merged(parameter: Tensor | AdaptedMatrix) -> Tensor:
    """Return a parameter multiplied out."""
    return parameter.merged() if isinstance(parameter, AdaptedMatrix) else parameter
