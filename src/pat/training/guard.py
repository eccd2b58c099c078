"""Stop a run whose gradients are no longer finite, before they reach the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pat.errors import RunFailed


class FiniteGuard(TrainerCallback):
    """Raise before an optimizer step whose gradients are not finite, so that the last good weights stay.

    Trainers hide a non-finite loss from their logs by default, and one bad step ruins every adapter weight.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients of all trainable parameters.

        Raises:
            RunFailed: some gradient is infinite or not a number.
        """
        if args.fp16:
            return  # The loss scaler overflows on purpose and skips such steps by itself.
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else []
        if norms and not torch.stack([norm.float() for norm in norms]).isfinite().all():
            raise RunFailed(
                f"The loss or its gradients became non-finite at step {state.global_step}; expected finite numbers: "
                "lower --learning_rate or --mask_lr_multiplier, or check the base model and the data."
            )
