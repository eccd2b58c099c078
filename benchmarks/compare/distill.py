"""Training that learns from a teacher as well as from the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from trl import SFTTrainer

from pat.nll import IGNORED

WEIGHT = 0.5
"""Share of the teacher in the loss, where a comparison does not give one."""


class DistillingTrainer(SFTTrainer):
    """TRL's trainer with `(1 - w) CE + w KL(teacher || student)`, on the tokens of the responses.

    Args:
        teacher: a model of the same vocabulary; it is put into eval mode.
        weight: w, in [0, 1].
        arguments: those of SFTTrainer.
    """

    def __init__(self, *, teacher: nn.Module, weight: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher, self.weight = teacher.eval().requires_grad_(False), weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, normalised as the trainer's own is: by the number of response tokens of the whole step."""
        given = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        targets = inputs["labels"][:, 1:]
        scored = targets != IGNORED
        outputs = model(**given)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(**given).logits[:, :-1][scored]
        num_tokens = scored.sum() if num_items_in_batch is None else num_items_in_batch
        loss = distillation_loss(outputs.logits[:, :-1][scored], taught, targets[scored], self.weight)
        loss = loss / torch.as_tensor(num_tokens, device=loss.device).clamp(min=1)
        return (loss, outputs) if return_outputs else loss


def distillation_loss(student: Tensor, teacher: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Return the sum over tokens of `(1 - w) CE + w KL(teacher || student)`, in nats, temperature 1.

    Args:
        student: logits `(N, V)`.
        teacher: logits `(N, V)`.
        targets: the tokens of the data, `(N,)`.
        weight: w.
    """
    student, teacher = (log_softmax(logits.float(), dim=-1) for logits in (student, teacher))
    divergence = (teacher.exp() * (teacher - student)).sum()
    return (1 - weight) * cross_entropy(student, targets, reduction="sum") + weight * divergence
