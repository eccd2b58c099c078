"""The unified sparsification mask: one gate over the residual channels, shared by every operator (paper, eq. 6-9).

Besides the paper's proxy weights the mask holds what the specification adds to it: a prior order of the channels, a set
of pinned channels, and an orthogonal basis in which the channels are counted. With a basis Q the gate acts as
`z = Q (m * Qᵀ y)`; without one as `z = m * y`.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pat.errors import PatError
from pat.method.losses import active_channel_loss
from pat.method.schedule import offset, temperature

MaskKind = Literal["trainable", "frozen"]


class UnifiedMask(nn.Module):
    """Gate `m` of shape `(d,)` over the residual stream.

    Args:
        hidden_size: d, the number of residual channels.
        pruned_hidden_size: d', the number of channels kept from the milestone on.
        kind: `trainable` proxy weights, or the paper's `frozen` ablation that attenuates a fixed set linearly: the
            first d - d' channels as the specification has it, or, once calibrated, the last d - d' of the prior order
            (the trailing ones of a rotation, the least important ones without one).
        has_basis: whether there is a basis Q (identity until `set_prior`).
        has_head_factor: whether there is a factor `(d,)` on the final norm's output, equalised over original gain,
            which a rotation of a tied model needs (ones until `set_prior`). The mask only stores it.
        lr_multiplier: the proxy weights are `lr_multiplier * weight`, so that an optimizer whose step does not depend
            on the gradient's size (Adam) moves them that many times faster than its other parameters.
    """

    weight: nn.Parameter | None
    prior: Tensor
    pinned: Tensor
    keep: Tensor
    basis: Tensor | None
    dropped_basis: Tensor | None
    head_factor: Tensor | None
    progress: Tensor
    gate_schedule: Tensor
    frozen_keep: Tensor | None
    attenuation: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        pruned_hidden_size: int,
        *,
        kind: MaskKind = "trainable",
        has_basis: bool = False,
        has_head_factor: bool = False,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.pruned_hidden_size = pruned_hidden_size
        self.lr_multiplier = lr_multiplier
        if kind == "trainable":
            self.weight = nn.Parameter(torch.zeros(hidden_size))
        else:
            self.register_parameter("weight", None)
        self.register_buffer("prior", torch.zeros(hidden_size))
        self.register_buffer("pinned", torch.zeros(hidden_size, dtype=torch.bool))
        self.register_buffer("keep", torch.ones(hidden_size, dtype=torch.bool))
        self.register_buffer("basis", torch.eye(hidden_size) if has_basis else None)
        self.register_buffer("dropped_basis", None, persistent=False)
        self.register_buffer("head_factor", torch.ones(hidden_size) if has_head_factor else None)
        # (step, milestone step or -1, hardened, calibrated): saved with the adapter, mirrored in plain attributes: the
        # forward pass must not read a tensor to choose its branch (a device synchronisation, a graph break).
        self.register_buffer("progress", torch.tensor([0, -1, 0, 0]))
        # (tau, beta) as a tensor, so that a compiled forward pass is not specialised on every step's value.
        self.register_buffer("gate_schedule", torch.tensor([1.0, 0.5]), persistent=False)
        # The frozen mask's counterpart: the set that stays and the gate of the others.
        frozen = kind == "frozen"
        self.register_buffer("frozen_keep", self._frozen_choice_without_prior() if frozen else None, persistent=False)
        self.register_buffer("attenuation", torch.ones(()) if frozen else None, persistent=False)
        self._cast: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.step = 0
        self.milestone_step: int | None = None
        self.hardened = False
        self.calibrated = False
        self.register_load_state_dict_post_hook(_restore_progress)  # type: ignore[no-untyped-call]

    # -- state -------------------------------------------------------------------------------------------------

    def set_step(self, step: int, milestone_step: int) -> None:
        """Move to an optimizer step; harden if it is the milestone or later. A hard mask never changes again.

        Raises:
            PatError: hard from step 0 is asked for and there is no prior order to choose the channels by.
        """
        if self.hardened:
            return
        if milestone_step == 0 and not self.has_prior:
            raise PatError(
                "Got a milestone at step 0, but there is no prior order of the channels to choose by; "
                "use a rotation (rotation='pca'), calibrate first, or a milestone after the first step."
            )
        self.step, self.milestone_step = step, milestone_step
        if step >= milestone_step:
            self.keep.copy_(self._select())
            self.hardened = True
        self._record_progress()

    def set_prior(
        self,
        prior: Tensor,
        *,
        pinned: Tensor | None = None,
        basis: Tensor | None = None,
        head_factor: Tensor | None = None,
    ) -> None:
        """Install the outcome of a calibration.

        Args:
            prior: prior order p, `(d,)`.
            pinned: channels that are never cut, boolean `(d,)`.
            basis: orthogonal Q, `(d, d)`.
            head_factor: factor on the final norm's output, `(d,)`.
        """
        self._widen_buffers()
        self.prior.copy_(prior)
        if pinned is not None:
            self.pinned.copy_(pinned)
        if basis is not None:
            assert self.basis is not None, "this mask was built without a basis"
            self.basis.copy_(basis)
        if head_factor is not None:
            assert self.head_factor is not None, "this mask was built without a head factor"
            self.head_factor.copy_(head_factor)
        self.calibrated = True
        self._record_progress()

    def restore_float32(self) -> None:
        """Undo a cast of the buffers to half precision, where that has changed no value.

        Raises:
            PatError: a calibration's outcome has been rounded; a basis in bfloat16 is no longer orthogonal.
        """
        rounded = [name for name in ("prior", "basis", "head_factor") if _is_half(getattr(self, name))]
        if self.calibrated and rounded:
            raise PatError(
                f"Got a calibrated mask with {', '.join(rounded)} in {self.prior.dtype}; expected float32, the model "
                "was cast with the adapter on it. Cast the base before attaching or loading the adapter, or call "
                "calibrate() again before training."
            )
        self._widen_buffers()
        self._refresh()

    @property
    def has_prior(self) -> bool:
        """Whether a calibration has ordered the channels."""
        return self.calibrated and bool(self.prior.any())

    @property
    def keep_indices(self) -> Tensor:
        """Kept channels, ascending, of shape `(d',)`; all channels before the milestone."""
        return self.keep.nonzero().squeeze(1)

    # -- function ----------------------------------------------------------------------------------------------

    def proxy_weights(self) -> Tensor:
        """Return w_M of shape `(d,)`, zeros for a frozen mask."""
        return self.lr_multiplier * self.weight if self.weight is not None else torch.zeros_like(self.prior)

    def gate(self) -> Tensor:
        """Return m of shape `(d,)` (eq. 6): soft values in (0, 1.5) before the milestone, 0/1 after it."""
        if self.hardened:
            hard = self.keep.to(self.prior.dtype)
            # The zero term keeps the proxy weights in the graph: distributed training stops with an error when a
            # trainable parameter leaves it.
            return hard + 0.0 * self.weight if self.weight is not None else hard
        if self.attenuation is not None and self.frozen_keep is not None:
            return torch.where(self.frozen_keep, 1.0, self.attenuation)
        tau, beta = self.gate_schedule.unbind()
        soft = torch.sigmoid(tau * (self.proxy_weights() + (1 - 2 * beta) * self.prior)) + beta
        return torch.where(self.pinned, 1.0, soft)

    def forward(self, y: Tensor) -> Tensor:
        """Apply the gate in its basis to `y` of shape `(..., d)`; dtype and device of `y` are kept."""
        if self.basis is None:
            return (y * self.gate().to(y.device)).to(y.dtype)
        if self.dropped_basis is not None:
            # Hard: subtract what lies in the dropped directions, which are fewer than the kept ones.
            dropped = self._cast_like("dropped_basis", self.dropped_basis, y)
            removed = (y @ dropped) @ dropped.mT
            kept = y - removed.to(y.dtype)
            return kept + 0.0 * self.weight.sum().to(y) if self.weight is not None else kept
        # As a correction to y, the gate is exactly the identity where m = 1, and the gradient of m still flows.
        basis = self._cast_like("basis", self.basis, y)
        change = ((y @ basis) * (self.gate() - 1.0).to(y)) @ basis.mT
        return y + change.to(y.dtype)

    def active_loss(self) -> Tensor:
        """Return L_active (eq. 9) over the channels that take part in selection; 0 once hard or if frozen."""
        if self.hardened or self.weight is None:
            return self.prior.new_zeros(())
        free = ~self.pinned
        num_pinned = int(self.pinned.sum())
        return active_channel_loss((self.proxy_weights() + self.prior)[free], self.pruned_hidden_size - num_pinned)

    # -- internals ---------------------------------------------------------------------------------------------

    def _select(self) -> Tensor:
        """Choose exactly d' channels: the pinned ones, then the best scores, ties broken by index (ascending)."""
        if self.weight is None:
            return self._frozen_choice()
        return self._best(self.proxy_weights().detach() + self.prior)

    def _frozen_choice(self) -> Tensor:
        """Kept set of the frozen mask: all but the first d - d' channels, or the best of the prior order."""
        return self._best(self.prior) if self.has_prior else self._frozen_choice_without_prior()

    def _frozen_choice_without_prior(self) -> Tensor:
        return torch.arange(self.hidden_size, device=self.prior.device) >= self.hidden_size - self.pruned_hidden_size

    def _best(self, score: Tensor) -> Tensor:
        score = score.masked_fill(self.pinned, torch.inf)
        order = torch.sort(score, descending=True, stable=True).indices
        keep = torch.zeros_like(self.keep)
        keep[order[: self.pruned_hidden_size]] = True
        return keep

    def _widen_buffers(self) -> None:
        for name, buffer in list(self.named_buffers()):
            if _is_half(buffer):
                setattr(self, name, buffer.float())

    def _record_progress(self) -> None:
        milestone = -1 if self.milestone_step is None else self.milestone_step
        values = [self.step, milestone, int(self.hardened), int(self.calibrated)]
        self.progress.copy_(torch.tensor(values, dtype=torch.int64))
        self._refresh()

    def _refresh(self) -> None:
        """Recompute what follows from the state: the schedule, the frozen set, the dropped part of the basis."""
        self._cast.clear()
        if self.milestone_step is not None and not self.hardened:
            values = [temperature(self.step, self.milestone_step), offset(self.step, self.milestone_step)]
            self.gate_schedule.copy_(torch.tensor(values, dtype=self.gate_schedule.dtype))
            if self.attenuation is not None:
                self.attenuation.fill_(1.0 - self.step / self.milestone_step)
        if self.frozen_keep is not None:
            self.frozen_keep.copy_(self._frozen_choice())
        self.dropped_basis = (
            self.basis[:, ~self.keep].contiguous() if self.hardened and self.basis is not None else None
        )

    def _cast_like(self, name: str, matrix: Tensor, y: Tensor) -> Tensor:
        """Return a constant matrix in dtype and on the device of `y`.

        One copy for all writers: autograd keeps what it is given until the backward pass, and a cast of its own for
        every writer would keep as many copies of a `(d, d)` matrix.
        """
        key = (name, y.dtype, y.device)
        if torch.compiler.is_compiling() or (matrix.dtype, matrix.device) == key[1:]:
            return matrix.to(y)  # a compiler shares equal casts itself, and would guard on the dictionary's contents
        if key not in self._cast:
            with torch.inference_mode(False):  # a copy made in inference could not be used in training later
                self._cast[key] = matrix.to(y)
        return self._cast[key]

    def _apply(self, fn: Any, recurse: bool = True) -> UnifiedMask:
        self._cast.clear()
        return cast(UnifiedMask, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the casts out of copies and pickles: they are made anew when needed."""
        return self.__dict__ | {"_cast": {}}


def _is_half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


def _restore_progress(module: nn.Module, _incompatible_keys: Any) -> None:
    mask = cast(UnifiedMask, module)
    if mask.progress.is_meta:
        return
    step, milestone, hardened, calibrated = mask.progress.tolist()
    mask.step = step
    mask.milestone_step = None if milestone < 0 else milestone
    mask.hardened, mask.calibrated = bool(hardened), bool(calibrated)
    mask._refresh()
