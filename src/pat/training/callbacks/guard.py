"""Stop a run whose gradients are no longer finite, before they reach the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pat.errors import Diverged
from pat.tuner.shared import sum_over_processes

MAX_SKIPPED_STEPS = 20
"""Steps in a row that a float16 loss scaler may skip. It starts at 2**16 and halves at every overflow, so 16 steps take
it to a scale of 1: a run that still overflows then is broken, not badly scaled."""


class FiniteGuard(TrainerCallback):
    """Raise before an optimizer step whose gradients are not finite, so that the last good weights stay.

    Trainers hide a non-finite loss from their logs by default, and one bad step ruins every adapter weight. Under
    float16 the loss scaler overflows on purpose and skips such steps by itself; only a run that does nothing else is
    stopped.
    """

    def __init__(self) -> None:
        self._num_skipped = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients of all trainable parameters.

        Raises:
            Diverged: some gradient is infinite or not a number; under float16, for `MAX_SKIPPED_STEPS` steps in a row.
        """
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # Of sharded ones each process has a part, which may be empty; what one has found is for all.
        gradients = [own for g in gradients if (own := g.to_local() if isinstance(g, DTensor) else g).numel()]
        # The largest entry: a sum of squares could overflow where every gradient is finite.
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        is_bad = (~largest.isfinite()).float()
        if not gradients:  # DeepSpeed has stepped already, and leaves out a step whose gradients are not finite
            is_bad.fill_(float(getattr(kwargs.get("optimizer"), "step_was_skipped", False)))
        sum_over_processes(is_bad)
        if not is_bad:
            self._num_skipped = 0
            return
        self._num_skipped += 1
        if args.fp16 and self._num_skipped < MAX_SKIPPED_STEPS:
            return
        since = f", for {self._num_skipped} steps in a row" if args.fp16 else ""
        remedy = ", or use bf16 instead of fp16" if args.fp16 else ""
        raise Diverged(
            f"The loss or its gradients became non-finite at step {state.global_step}{since}; expected finite numbers: "
            f"lower --learning_rate or --mask_lr_multiplier{remedy}, or check the base model and the data."
        )
