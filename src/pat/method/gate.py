"""A gate over one axis of a model: soft and trained at first, 0/1 from the milestone on (paper, eq. 6-9).

A gate knows how many entries its axis has and how many of them stay, not what they are. To the paper's proxy weights
it adds a prior order of the entries and a set of pinned ones (docs/adr/0004).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pat.errors import PatError
from pat.method.losses import active_channel_loss, total_of
from pat.method.schedule import offset, temperature
from pat.method.sharded import whole

GateKind = Literal["trainable", "frozen"]


class Gate(nn.Module):
    """Gate `m` of shape `(size,)` that multiplies the last axis of its input, or a stack of such gates.

    In a stack every gate keeps as many entries as the others, and others than they; all shapes below then have the
    number of gates before them.

    Args:
        size: number of entries on the axis.
        num_kept: number of entries that stay from the milestone on.
        kind: `trainable` proxy weights, or the paper's `frozen` ablation, which attenuates a fixed set linearly: the
            first `size - num_kept` entries, or, once there is a prior order, its last ones.
        lr_multiplier: the proxy weights are `lr_multiplier * weight`, so that an optimizer whose step does not depend
            on the gradient's size (Adam) moves them that many times faster than its other parameters.
        num_stacked: number of gates in a stack; None makes a single one.
    """

    measured: tuple[str, ...] = ("prior",)
    """Names of the buffers that a calibration fills."""

    weight: nn.Parameter | None
    prior: Tensor
    pinned: Tensor
    keep: Tensor
    progress: Tensor
    gate_schedule: Tensor
    frozen_values: Tensor | None

    def __init__(
        self,
        size: int,
        num_kept: int,
        *,
        kind: GateKind = "trainable",
        lr_multiplier: float = 1.0,
        num_stacked: int | None = None,
    ) -> None:
        super().__init__()
        shape = (size,) if num_stacked is None else (num_stacked, size)
        self.size = size
        self.num_kept = num_kept
        self.lr_multiplier = lr_multiplier
        frozen = kind == "frozen"
        self.register_parameter("weight", None if frozen else nn.Parameter(torch.zeros(shape)))
        self.register_buffer("prior", torch.zeros(shape))
        self.register_buffer("pinned", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("keep", torch.ones(shape, dtype=torch.bool))
        # (step, milestone step or -1, hardened, calibrated): saved with the adapter, mirrored in plain attributes,
        # because the forward pass must not read a tensor to choose its branch (a synchronisation, a graph break).
        self.register_buffer("progress", torch.tensor([0, -1, 0, 0]))
        # (tau, beta) as a tensor, so that a compiled forward pass is not specialised on every step's value.
        self.register_buffer("gate_schedule", torch.tensor([1.0, 0.5]), persistent=False)
        # The frozen gate's counterpart: its values themselves.
        self.register_buffer("frozen_values", torch.ones(shape) if frozen else None, persistent=False)
        self.step = 0
        self.milestone_step: int | None = None
        self.hardened = False
        self.calibrated = False
        self.register_load_state_dict_post_hook(_restore_progress)  # type: ignore[no-untyped-call]

    # -- state -------------------------------------------------------------------------------------------------

    def set_step(self, step: int, milestone_step: int) -> None:
        """Move to an optimizer step; harden if it is the milestone or later. A hard gate never changes again.

        Raises:
            PatError: the milestone is step 0 and there is no prior order to choose the entries by.
        """
        if self.hardened:
            return
        self.check_milestone(milestone_step)
        self.step, self.milestone_step = step, milestone_step
        if step >= milestone_step:
            self.keep.copy_(self._select())
            self.hardened = True
        self._record_progress()

    def check_milestone(self, milestone_step: int) -> None:
        """Check that the gate can become hard at a step.

        Raises:
            PatError: it is step 0, and there is no prior order to choose the entries by.
        """
        if milestone_step == 0 and not self.hardened and not self.has_prior and self.num_kept < self.size:
            raise PatError(
                "Got a milestone at step 0, but there is no prior order to choose by; calibrate first (rotation='auto' "
                "does when training begins), or use a milestone after the first step."
            )

    def check_kept(self, adapter: str) -> None:
        """Check that a hard gate keeps as many entries as it should, which another adapter's configuration contradicts.

        Args:
            adapter: the words for it that the message begins with.

        Raises:
            PatError: it keeps more or fewer.
        """
        num_kept = self.keep.sum(-1)
        if self.hardened and bool((num_kept != self.num_kept).any()):
            raise PatError(
                f"{adapter} keeps {num_kept.tolist()} entries where its configuration says {self.num_kept}; one of the "
                "two was changed after the adapter was made, or it was loaded with another configuration than its own."
            )

    def set_prior(self, prior: Tensor, *, pinned: Tensor | None = None) -> None:
        """Install the outcome of a calibration, before the gate is hard.

        Args:
            prior: prior order p, `(size,)`.
            pinned: entries that are never cut, boolean `(size,)`.
        """
        assert not self.hardened, "a hard gate never changes again"
        self._widen_buffers()
        self.prior.copy_(prior)
        if pinned is not None:
            self.pinned.copy_(pinned)
        self.calibrated = True
        self._record_progress()

    def restore_float32(self) -> None:
        """Undo a cast of the buffers to half precision, where that has changed no value.

        Raises:
            PatError: a calibration's outcome has been rounded; a basis in bfloat16 is no longer orthogonal.
        """
        rounded = [name for name in self.measured if _is_half(getattr(self, name))]
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
        """Whether a calibration has ordered the entries."""
        return self.calibrated and bool(self.prior.any())

    @property
    def keep_indices(self) -> Tensor:
        """Kept entries, ascending, of shape `(num_kept,)`; all entries before the milestone."""
        return self.keep.nonzero().squeeze(1)

    @property
    def num_active(self) -> int:
        """Number of entries that eq. 9 counts, the pinned ones included; those that stay if hard or frozen.

        Of a stack it is the rounded mean.
        """
        if self.hardened or self.weight is None:
            return self.num_kept
        active = int(((whole(self.proxy_weights()) + self.prior > 0) | self.pinned).sum())
        return round(active * self.size / self.keep.numel())

    # -- function ----------------------------------------------------------------------------------------------

    def proxy_weights(self) -> Tensor:
        """Return w_M of shape `(size,)`, zeros for a frozen gate."""
        return self.lr_multiplier * self.weight if self.weight is not None else torch.zeros_like(self.prior)

    def values(self) -> Tensor:
        """Return m of shape `(size,)` (eq. 6): soft values in (0, 1.5) before the milestone, 0/1 after it."""
        if self.hardened:
            hard = self.keep.to(self.prior.dtype)
            # The zero term keeps the proxy weights in the graph: distributed training stops with an error when a
            # trainable parameter leaves it.
            return hard + 0.0 * self.weight if self.weight is not None else hard
        if self.frozen_values is not None:
            return self.frozen_values
        tau, beta = self.gate_schedule.unbind()
        soft = torch.sigmoid(tau * (self.proxy_weights() + (1 - 2 * beta) * self.prior)) + beta
        return torch.where(self.pinned, 1.0, soft)

    def forward(self, y: Tensor) -> Tensor:
        """Multiply `y` of shape `(..., size)` by the gate; dtype and device of `y` are kept."""
        return (y * self.values().to(y.device)).to(y.dtype)

    def regularized(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the parameters that have a loss of their own, L_active (eq. 9), by name; none once hard or if frozen.

        It is over the entries that take part in selection, and a function of the whole parameter, `(size,)`.
        """
        return {} if self.hardened or self.weight is None else {"weight": self._active_loss}

    def active_loss(self) -> Tensor:
        """Return L_active (eq. 9); 0 once hard or if frozen. Of a stack it is the mean, so experts count as one MLP."""
        return total_of(self, self.prior.new_zeros(()))

    # -- internals ---------------------------------------------------------------------------------------------

    def _active_loss(self, weight: Tensor) -> Tensor:
        free = ~self.pinned
        num_pinned = int(self.pinned.view(-1, self.size)[0].sum())  # as many in each row of a stack
        logits = (self.lr_multiplier * weight + self.prior)[free].unflatten(0, (*self.keep.shape[:-1], -1))
        return active_channel_loss(logits, self.num_kept - num_pinned)

    def _select(self) -> Tensor:
        """Choose exactly `num_kept` entries: the pinned ones, then the best scores, ties broken by index."""
        if self.weight is None:
            return self._frozen_choice()
        return self._best(whole(self.proxy_weights().detach()) + self.prior)

    def _frozen_choice(self) -> Tensor:
        in_place = torch.arange(self.size, device=self.prior.device, dtype=self.prior.dtype)
        return self._best(self.prior if self.has_prior else in_place.expand_as(self.prior))

    def _best(self, score: Tensor) -> Tensor:
        score = score.masked_fill(self.pinned, torch.inf)
        order = torch.sort(score, descending=True, stable=True).indices
        return torch.zeros_like(self.keep).scatter_(-1, order[..., : self.num_kept], True)

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
        """Recompute what follows from the state: the values of the schedule, or of a frozen gate."""
        if self.milestone_step is None or self.hardened:
            return
        if self.frozen_values is None:
            values = [temperature(self.step, self.milestone_step), offset(self.step, self.milestone_step)]
            self.gate_schedule.copy_(torch.tensor(values, dtype=self.gate_schedule.dtype))
        else:
            self.frozen_values.fill_(1.0 - self.step / self.milestone_step)
            self.frozen_values.masked_fill_(self._frozen_choice(), 1.0)


def _is_half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


def _restore_progress(module: nn.Module, _incompatible_keys: Any) -> None:
    gate = cast(Gate, module)
    if gate.progress.is_meta:
        return
    step, milestone, hardened, calibrated = gate.progress.tolist()
    gate.step = step
    gate.milestone_step = None if milestone < 0 else milestone
    gate.hardened, gate.calibrated = bool(hardened), bool(calibrated)
    gate._refresh()
