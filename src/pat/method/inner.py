"""The gate over a space inside one branch, such as the channels of an MLP, and the refit that follows its cut.

A branch is readers, a nonlinear part whose output `a` has one entry per channel, and a writer W. The gate multiplies
`a`. Once it is hard, the dropped channels can be *reconstructed* from the kept ones by a linear map R that was fitted
on activations of the base model (docs/adr/0015):

    a[D] ~ R a[K],   R = H[D, K] (H[K, K] + ridge)^-1,   H = sum over tokens of a aᵀ

so the writer sees `W[:, K] a[K] + W[:, D] R a[K]`. What a merge writes is the one matrix `W[:, K] + W[:, D] R`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pat.method.gate import Gate, GateKind


class InnerGate(Gate):
    """Gate `(size,)` before a writer, with the map R that fills in for what it drops.

    Args:
        size: number of channels of the space.
        num_kept: number of channels that stay.
        kind: see `Gate`.
        refits: whether there is a map R of shape `(size - num_kept, num_kept)` (zero until `set_reconstruction`).
        lr_multiplier: see `Gate`.
    """

    measured = ("prior", "reconstruction")

    reconstruction: Tensor | None
    fitted: Tensor
    kept: Tensor
    order: Tensor

    def __init__(
        self,
        size: int,
        num_kept: int,
        *,
        kind: GateKind = "trainable",
        refits: bool = True,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(size, num_kept, kind=kind, lr_multiplier=lr_multiplier)
        self.register_buffer("reconstruction", torch.zeros(size - num_kept, num_kept) if refits else None)
        self.register_buffer("fitted", torch.tensor(False))
        self.is_fitted = False  # mirrored, as `hardened` is
        # The kept channels, ascending, and where each channel stands in [kept, dropped].
        self.register_buffer("kept", torch.arange(num_kept), persistent=False)
        self.register_buffer("order", torch.arange(size), persistent=False)

    @property
    def awaits_refit(self) -> bool:
        """Whether the gate is hard and R still to be fitted; it is zero until then, which drops without replacement."""
        fits = self.hardened and self.reconstruction is not None and self.num_kept < self.size
        return fits and not self.is_fitted

    def set_reconstruction(self, matrix: Tensor) -> None:
        """Install R `(size - num_kept, num_kept)`, once the gate is hard."""
        assert self.hardened and self.reconstruction is not None, "a refit needs to know what is cut"
        self.reconstruction.copy_(matrix)
        self.fitted.fill_(True)
        self.is_fitted = True

    def forward(self, y: Tensor) -> Tensor:
        """Apply gate and reconstruction to `y` of shape `(..., size)`; dtype and device of `y` are kept."""
        if not self.hardened or self.reconstruction is None:
            return super().forward(y)
        kept = y.index_select(-1, self.kept.to(y.device))
        if self.weight is not None:
            kept = kept + 0.0 * self.weight.sum().to(y)  # see `Gate.values`
        dropped = kept @ self.reconstruction.mT.to(kept)
        return torch.cat([kept, dropped], dim=-1).index_select(-1, self.order.to(y.device))

    def _refresh(self) -> None:
        super()._refresh()
        self.is_fitted = bool(self.fitted)
        if self.hardened:
            kept_first = torch.sort((~self.keep).to(torch.uint8), stable=True).indices
            self.kept.copy_(kept_first[: self.num_kept])
            self.order.copy_(kept_first.argsort())
