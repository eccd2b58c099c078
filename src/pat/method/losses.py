"""The two losses that depend on parameters alone (paper, eq. 9, 11 and 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pat.method.sharded import whole

NORM_EPSILON = 1e-8
"""Number added under the root of every norm. At X = 0 the bare Frobenius norm has a gradient of size one made of
rounding, which Adam would turn into full-size steps while v = 0 gives L0 and L1 no gradient from the task."""


def active_channel_loss(logits: Tensor, num_target: int) -> Tensor:
    """Return |N_target - N_active| with a straight-through gradient to the proxy weights (eq. 9).

    Args:
        logits: proxy weights plus prior of the channels that take part in selection, of shape `(d,)`; a channel
            counts as active if its value is positive. Of several such rows, `(n, d)`, the mean is returned.
        num_target: number of those channels that shall stay.
    """
    hard = (logits.detach() > 0).to(logits.dtype)
    active = hard + (logits - logits.detach())
    return (num_target - active.sum(-1)).abs().mean()


def orthogonality_loss(rows: Tensor) -> Tensor:
    """Return ||R Rᵀ - I||, the smoothed Frobenius distance of the rows from orthonormality (eq. 11).

    Args:
        rows: matrix of shape `(r, d)`; pass L1 transposed to measure its columns.
    """
    gram = rows @ rows.mT
    gram = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram.square().sum() + NORM_EPSILON).sqrt()


class Regularized(Protocol):
    """A module, some of whose parameters have a loss of their own."""

    def regularized(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the loss of each such parameter, a function of the whole parameter, by the parameter's name."""


def total_of(module: Regularized, zero: Tensor) -> Tensor:
    """Return the sum of a module's own losses, a scalar with gradients; `zero` where there are none."""
    return sum((loss(whole(getattr(module, name))) for name, loss in module.regularized().items()), zero)
