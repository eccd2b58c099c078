"""The unified sparsification mask: the gate over the residual channels, in the basis in which they are counted.

With an orthogonal basis Q the gate m acts as `z = Q (m * Qᵀ y)`; without one as `z = m * y` (docs/adr/0004).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pat.method.gate import Gate, GateKind


class UnifiedMask(Gate):
    """One gate over the residual stream, shared by every operator (paper, eq. 6-8).

    Args:
        hidden_size: d, the number of residual channels.
        pruned_hidden_size: d', the number of channels kept from the milestone on.
        kind: see `Gate`.
        has_basis: whether there is a basis Q (identity until `set_prior`).
        has_head_factor: whether there is a factor `(d,)` on the final norm's output, equalised over original gain,
            which a rotation of a tied model needs (ones until `set_prior`). The mask only stores it.
        lr_multiplier: see `Gate`.
    """

    measured = ("prior", "basis", "head_factor")

    basis: Tensor | None
    dropped_basis: Tensor | None
    head_factor: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        pruned_hidden_size: int,
        *,
        kind: GateKind = "trainable",
        has_basis: bool = False,
        has_head_factor: bool = False,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(hidden_size, pruned_hidden_size, kind=kind, lr_multiplier=lr_multiplier)
        self.register_buffer("basis", torch.eye(hidden_size) if has_basis else None)
        self.register_buffer("dropped_basis", None, persistent=False)
        self.register_buffer("head_factor", torch.ones(hidden_size) if has_head_factor else None)
        self._casts: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @property
    def hidden_size(self) -> int:
        """d, the number of residual channels."""
        return self.size

    @property
    def pruned_hidden_size(self) -> int:
        """d', the number of channels that stay."""
        return self.num_kept

    def set_prior(
        self,
        prior: Tensor,
        *,
        pinned: Tensor | None = None,
        basis: Tensor | None = None,
        head_factor: Tensor | None = None,
    ) -> None:
        """Install the outcome of a calibration, before the mask is hard.

        Args:
            prior: prior order p, `(d,)`.
            pinned: channels that are never cut, boolean `(d,)`.
            basis: orthogonal Q, `(d, d)`.
            head_factor: factor on the final norm's output, `(d,)`.
        """
        self._widen_buffers()
        if basis is not None:
            assert self.basis is not None, "this mask was built without a basis"
            self.basis.copy_(basis)
        if head_factor is not None:
            assert self.head_factor is not None, "this mask was built without a head factor"
            self.head_factor.copy_(head_factor)
        super().set_prior(prior, pinned=pinned)

    def forward(self, y: Tensor) -> Tensor:
        """Apply the gate in its basis to `y` of shape `(..., d)`; dtype and device of `y` are kept."""
        if self.basis is None:
            return super().forward(y)
        if self.dropped_basis is not None:
            # Hard: subtract what lies in the dropped directions, which are fewer than the kept ones.
            dropped = self._cast_like("dropped_basis", self.dropped_basis, y)
            removed = (y @ dropped) @ dropped.mT
            kept = y - removed.to(y.dtype)
            return kept + 0.0 * self.weight.sum().to(y) if self.weight is not None else kept
        # As a correction to y, the gate is exactly the identity where m = 1, and the gradient of m still flows.
        basis = self._cast_like("basis", self.basis, y)
        change = ((y @ basis) * (self.values() - 1.0).to(y)) @ basis.mT
        return y + change.to(y.dtype)

    def _refresh(self) -> None:
        super()._refresh()
        self._casts.clear()
        self.dropped_basis = (
            self.basis[:, ~self.keep].contiguous() if self.hardened and self.basis is not None else None
        )

    def _cast_like(self, name: str, matrix: Tensor, y: Tensor) -> Tensor:
        """Return a constant matrix in dtype and on the device of `y`.

        One copy serves all writers: autograd keeps what it is given until the backward pass, and a cast of its own for
        every writer would keep as many copies of a `(d, d)` matrix.
        """
        key = (name, y.dtype, y.device)
        if torch.compiler.is_compiling() or (matrix.dtype, matrix.device) == key[1:]:
            return matrix.to(y)  # a compiler shares equal casts itself, and would guard on the dictionary's contents
        if key not in self._casts:
            with torch.inference_mode(False):  # a copy made in inference could not be used in training later
                self._casts[key] = matrix.to(y)
        return self._casts[key]

    def _apply(self, fn: Any, recurse: bool = True) -> UnifiedMask:
        self._casts.clear()
        return cast(UnifiedMask, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the casts out of copies and pickles: they are made anew when needed."""
        return self.__dict__ | {"_casts": {}}
