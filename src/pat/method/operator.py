"""The trainable operator D of a hybrid sparsification module (paper, eq. 4, 5 and 10).

An operator is the identity, bit for bit, when it is made: D = I + change, and the change starts as exactly zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pat.errors import PatError
from pat.method.gate import Gate
from pat.method.losses import orthogonality_loss, total_of


class LowRankOperator(nn.Module):
    """D = I + L1 diag(v) L0 with L0 `(r, d)`, v `(r,)`, L1 `(d, r)`.

    L0 starts with orthonormal rows, L1 with orthonormal columns and v = 0, so that D is the identity and satisfies the
    identity loss at once.

    Args:
        hidden_size: d.
        rank: r.
        lr_multiplier: v is `lr_multiplier * scale`, see `UnifiedMask`. The columns of L1 have entries of about
            1/sqrt(d), so at an adapter's learning rate v alone would hardly move the operator in a short run.
    """

    def __init__(self, hidden_size: int, rank: int, *, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.lr_multiplier = lr_multiplier
        assert 1 <= rank <= hidden_size
        self.down = nn.Parameter(_orthonormal_rows(rank, hidden_size))
        self.scale = nn.Parameter(torch.zeros(rank))
        # A copy has the strides of a new tensor for a rank of 1 as well, without which DeepSpeed cannot view its bytes.
        columns = _orthonormal_rows(rank, hidden_size).mT.clone(memory_format=torch.contiguous_format)
        self.up = nn.Parameter(columns)

    def v(self) -> Tensor:
        """Return v of shape `(r,)`."""
        return self.lr_multiplier * self.scale

    def change(self, y: Tensor) -> Tensor:
        """Return (D - I) y for `y` of shape `(..., d)`, computed in the dtype and on the device of `y`."""
        down, scale, up = (p.to(y) for p in (self.down, self.v(), self.up))
        return F.linear(F.linear(y, down) * scale, up)

    def add_change(self, total: Tensor, y: Tensor) -> Tensor:
        """Add (D - I) y to `total` in place and return it, for `total` and `y` of shape `(n, d)` and one dtype."""
        down, scale, up = (p.to(y) for p in (self.down, self.v(), self.up))
        return total.addmm_(F.linear(y, down) * scale, up.mT)

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """Return m * (D y) for a gate m of shape `(d,)`, in the dtype and on the device of `y`.

        The gate goes into the small factor, which leaves it one pass over `y`: m * y + (m * L1 diag(v)) L0 y.
        """
        gate = gate.to(y)
        down, up = self.down.to(y), (self.up * self.v()).to(y) * gate.unsqueeze(1)
        flat = y.reshape(-1, y.shape[-1])
        small = F.linear(flat, down)
        if small.dtype != flat.dtype:  # under autocast, which leaves products in place alone
            return (flat * gate + F.linear(small, up).to(flat.dtype)).view_as(y)
        return (flat * gate).addmm_(small, up.mT).view_as(y)

    def change_transposed(self, y: Tensor) -> Tensor:
        """Return (Dᵀ - I) y for `y` of shape `(..., d)`, computed in the dtype and on the device of `y`."""
        down, scale, up = (p.to(y) for p in (self.down, self.v(), self.up))
        return F.linear(F.linear(y, up.mT) * scale, down.mT)

    def cut_outputs(self, cut: Callable[[Tensor], Tensor]) -> LowRankOperator:
        """Return an operator whose `change` is already cut: `cut` maps rows `(..., d)` to `(..., d')`, linearly."""
        twin = copy.deepcopy(self)
        twin.up = nn.Parameter(cut(self.up.detach().mT).mT.contiguous(), requires_grad=False)
        return twin

    def regularized(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the parts of the identity loss (eq. 11), by the parameter that each is a function of."""
        return {"down": orthogonality_loss, "up": _orthogonality_of_columns}

    def identity_loss(self) -> Tensor:
        """Return ||L0 L0ᵀ - I|| + ||L1ᵀ L1 - I|| (eq. 11)."""
        return total_of(self, self.scale.new_zeros(()))


class DenseOperator(nn.Module):
    """D = I + M with a full `(d, d)` matrix M, the "dense" operator of the paper's figure 4."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def change(self, y: Tensor) -> Tensor:
        """Return M y for `y` of shape `(..., d)`."""
        return F.linear(y, self.matrix.to(y))

    def add_change(self, total: Tensor, y: Tensor) -> Tensor:
        """Add M y to `total` in place and return it."""
        return total.add_(self.change(y))

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """Return m * (D y) for a gate m of shape `(d,)`."""
        return (y + self.change(y)) * gate.to(y)

    def change_transposed(self, y: Tensor) -> Tensor:
        """Return Mᵀ y for `y` of shape `(..., d)`."""
        return F.linear(y, self.matrix.mT.to(y))

    def cut_outputs(self, cut: Callable[[Tensor], Tensor]) -> DenseOperator:
        """Return an operator whose `change` is already cut, see `LowRankOperator`."""
        twin = copy.deepcopy(self)
        twin.matrix = nn.Parameter(cut(self.matrix.detach().mT).mT.contiguous(), requires_grad=False)
        return twin

    def regularized(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the identity loss as a function of M."""
        return {"matrix": _orthogonality_of_change}

    def identity_loss(self) -> Tensor:
        """Return ||D Dᵀ - I||, the counterpart of eq. 11 for an operator with a single factor."""
        return total_of(self, self.matrix.new_zeros(()))


Operator = LowRankOperator | DenseOperator

DEFAULT_RANK_SHARE = 0.05
"""Default rank as a share of the hidden size; the paper uses 200 of 4096."""

RANK_MULTIPLE = 8
"""Default ranks are multiples of this number where they can be: products with a rank of 51 take a third longer than
with 48 on a CPU's vector units, and tensor cores need it."""


def build_operator(hidden_size: int, rank: int | str | None, *, lr_multiplier: float = 1.0) -> Operator:
    """Build an operator: a low-rank one of the given rank (None: about 5 % of the hidden size), or `"dense"`.

    Raises:
        PatError: the rank is neither a legal number nor `"dense"`.
    """
    check_rank(hidden_size, rank)
    if rank == "dense":
        return DenseOperator(hidden_size)
    if rank is None:
        rank = default_rank(hidden_size)
    return LowRankOperator(hidden_size, int(rank), lr_multiplier=lr_multiplier)


def regularizers(gates: Sequence[Gate], operators: Iterable[Operator]) -> dict[str, Tensor]:
    """Return the unweighted losses `active` (eq. 9) and `identity` (eq. 11) of an adapter, scalars with gradients.

    Both are on the device of the first gate; a model may be spread over several.
    """
    device, zero = gates[0].prior.device, gates[0].prior.new_zeros(())
    return {
        "active": sum((gate.active_loss().to(device) for gate in gates), zero),
        "identity": torch.stack([op.identity_loss().to(device) for op in operators] or [zero]).sum(),
    }


def default_rank(hidden_size: int) -> int:
    """Return the default rank for a hidden size: about 5 % of it."""
    rank = DEFAULT_RANK_SHARE * hidden_size
    return RANK_MULTIPLE * round(rank / RANK_MULTIPLE) if rank >= RANK_MULTIPLE else max(1, round(rank))


def check_rank(hidden_size: int, rank: int | str | None) -> None:
    """Check an operator rank against the width it is meant for.

    Raises:
        PatError: the rank is neither a legal number nor `"dense"`.
    """
    if rank is None or rank == "dense" or (type(rank) is int and 1 <= rank <= hidden_size):
        return
    raise PatError(
        f"Got operator_rank={rank!r}; expected 1 to {hidden_size} (the hidden size), 'dense', or None (5 %)."
    )


def _orthogonality_of_columns(matrix: Tensor) -> Tensor:
    return orthogonality_loss(matrix.mT)


def _orthogonality_of_change(matrix: Tensor) -> Tensor:
    return orthogonality_loss(matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def _orthonormal_rows(rows: int, columns: int) -> Tensor:
    weight = torch.empty(rows, columns)
    nn.init.orthogonal_(weight)
    return weight
