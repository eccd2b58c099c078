"""The gate over a space inside one branch, and the refit that follows its cut.

A branch is readers, a nonlinear part whose output `a` goes into a writer W. An entry of the space is an MLP channel,
which is one number of `a`, or a group of attention heads with one key/value head, whose numbers lie one after another.
The gate multiplies `a`. Once it is hard, the dropped channels can be *reconstructed* from the kept ones by a linear map
R that was fitted on activations of the base model (docs/adr/0015):

    a[D] ~ R a[K],   R = H[D, K] (H[K, K] + ridge)^-1,   H = sum over tokens of a aᵀ

so the writer sees `W[:, K] a[K] + W[:, D] R a[K]`. What a merge writes is the one matrix `W[:, K] + W[:, D] R`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pat.method.gate import Gate, GateKind


class InnerGate(Gate):
    """Gate `(size,)` before a writer of `size * width` channels, with the map R that fills in for what it drops.

    Args:
        size: number of entries of the space.
        num_kept: number of entries that stay.
        width: number of channels before the writer for each entry.
        kind: see `Gate`.
        refits: whether there is a map R of shape `(dropped channels, kept channels)` (zero until `set_reconstruction`).
        lr_multiplier, num_stacked: see `Gate`.
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
        width: int = 1,
        kind: GateKind = "trainable",
        refits: bool = True,
        lr_multiplier: float = 1.0,
        num_stacked: int | None = None,
    ) -> None:
        super().__init__(size, num_kept, kind=kind, lr_multiplier=lr_multiplier, num_stacked=num_stacked)
        stack = self.keep.shape[:-1]
        self.width = width
        self.num_channels, kept = size * width, num_kept * width
        self.register_buffer("reconstruction", torch.zeros(*stack, self.num_channels - kept, kept) if refits else None)
        self.register_buffer("fitted", torch.tensor(False))
        self.is_fitted = False  # mirrored, as `hardened` is
        # The kept channels, ascending, and where each channel stands in [kept, dropped].
        self.register_buffer("kept", torch.arange(kept).repeat(*stack, 1).view(*stack, kept), persistent=False)
        self.register_buffer(
            "order", torch.arange(self.num_channels).repeat(*stack, 1).view(*stack, -1), persistent=False
        )

    @property
    def awaits_refit(self) -> bool:
        """Whether the gate is hard and R still to be fitted; it is zero until then, which drops without replacement."""
        fits = self.hardened and self.reconstruction is not None and self.num_kept < self.size
        return fits and not self.is_fitted

    @property
    def kept_channels(self) -> Tensor:
        """Which channels are kept, boolean `(size * width,)`."""
        return self._spread(self.keep)

    def set_reconstruction(self, matrix: Tensor) -> None:
        """Install R `(dropped channels, kept channels)`, once the gate is hard."""
        assert self.hardened and self.reconstruction is not None, "a refit needs to know what is cut"
        self.reconstruction.copy_(matrix)
        self.fitted.fill_(True)
        self.is_fitted = True

    def forward(self, y: Tensor) -> Tensor:
        """Apply gate and reconstruction to `y` of shape `(..., size * width)`; dtype and device of `y` are kept."""
        if not self.hardened or self.reconstruction is None:
            return (y * self._spread(self.values()).to(y.device)).to(y.dtype)
        kept = y.index_select(-1, self.kept.to(y.device))
        if self.weight is not None:
            kept = kept + 0.0 * self.weight.sum().to(y)  # see `Gate.values`
        dropped = kept @ self.reconstruction.mT.to(kept)
        return torch.cat([kept, dropped], dim=-1).index_select(-1, self.order.to(y.device))

    def _refresh(self) -> None:
        super()._refresh()
        self.is_fitted = bool(self.fitted)
        if self.hardened:
            kept_first = torch.sort((~self.kept_channels).to(torch.uint8), stable=True).indices
            self.kept.copy_(kept_first[..., : self.kept.shape[-1]])
            self.order.copy_(kept_first.argsort())

    def _spread(self, entries: Tensor) -> Tensor:
        """Repeat one value for each entry over the entry's channels."""
        return entries if self.width == 1 else entries.repeat_interleave(self.width)


class ExpertsGate(InnerGate):
    """The gates before the writers of all experts of a layer, which are one stacked parameter W `(experts, d, size)`.

    No module lies between an expert's readers and its writer, so the gates act on W: multiplying a channel by m is
    multiplying the column of W behind it, and `W[:, K] + W[:, D] R` is what a merge writes (docs/adr/0021).
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Apply gates and reconstructions to W `(experts, d, size)`; its dtype and device are kept."""
        if not self.hardened or self.reconstruction is None:
            return (weight * self.values().unsqueeze(1).to(weight.device)).to(weight.dtype)
        num_experts, hidden_size, _ = weight.shape
        place = self.order.argsort().to(weight.device).unsqueeze(1).expand(num_experts, hidden_size, -1)
        kept, dropped = place.tensor_split([self.kept.shape[-1]], dim=-1)
        # Rounded once, as the merged weight is.
        fine = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False):
            columns = torch.baddbmm(fine.gather(-1, kept), fine.gather(-1, dropped), self.reconstruction.to(fine))
        if self.weight is not None:
            columns = columns + 0.0 * self.weight.sum().to(columns)  # see `Gate.values`
        return torch.zeros_like(fine).scatter(-1, kept, columns).to(weight.dtype)
