"""Record of a training's cost in tokens and FLOPs, and of the model's loss, every few steps.

The FLOPs are an estimate by counts of parameters, two for each product of a number and a weight (Kaplan et al., 2020,
"Scaling Laws for Neural Language Models"). For one token and a model with N frozen parameters and A trained ones:

    forward 2 (N + A), backward to the activations 2 (N + A), backward to the weights 2 A: together 4 N + 6 A;
    a teacher of M parameters adds its forward pass, 2 M.

N leaves out an embedding that is looked up and not multiplied, and counts it where it is the head as well. Padding,
attention's own products, recomputed activations, the reading of calibration text, evaluations, and the training of the
teacher are left out; experts count as if all were active. Nothing is measured: kernels reach different shares of a
processor's speed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback

from compare.scoring import Scorer
from pat.surgery.describe import shares_head


@dataclass(frozen=True)
class Point:
    """The state of a training after a step."""

    step: int
    tokens: int
    """Tokens trained on so far, padding left out, each as often as it was seen."""
    flops: float
    """Estimated FLOPs so far, see the module."""
    nll: float
    """Loss of the validation rows' responses, in nats per token."""


def forward_parameters(model: nn.Module) -> int:
    """Return how many numbers of a model, adapters included, are multiplied with for each token."""
    ends: Any = model
    looked_up = 0 if shares_head(model) else ends.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - looked_up


def flops_per_token(num_frozen: int, num_trained: int, num_teacher: int = 0) -> int:
    """Return the FLOPs of a training step for each of its tokens; see the module for the formula."""
    return 4 * num_frozen + 6 * num_trained + 2 * num_teacher


class CurveRecorder(TrainerCallback):
    """Counts tokens and FLOPs of a training, which may go on with another model, and measures it every few steps.

    Args:
        score: of the validation rows; None where nothing is measured.
        every: steps between measurements; None measures nothing.
        num_teacher: parameters that a teacher multiplies with.
    """

    def __init__(self, score: Scorer | None, *, every: int | None, num_teacher: int = 0) -> None:
        self.score, self.every, self.num_teacher = score, every, num_teacher
        self.tokens, self.flops = 0, 0.0
        self.points: list[Point] = []
        self._seen = self._per_token = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the parameters of the model that is trained from here on."""
        model = kwargs["model"]
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        num_frozen = forward_parameters(model) - num_trained
        self._per_token = flops_per_token(num_frozen, num_trained, self.num_teacher)
        self._seen = state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add what the step has cost, and measure the model if it is time to."""
        new, self._seen = state.num_input_tokens_seen - self._seen, state.num_input_tokens_seen
        self.tokens += new
        self.flops += new * self._per_token
        is_due = self.every and (state.global_step % self.every == 0 or state.global_step == state.max_steps)
        if self.score is not None and is_due:
            nll = self.score(kwargs["model"], kwargs["processing_class"]).nll
            self.points.append(Point(state.global_step, self.tokens, self.flops, nll))

    def facts(self) -> dict[str, Any]:
        """Return what was found, for a line of JSON."""
        curve = {"curve": [asdict(point) for point in self.points]} if self.every else {}
        return {"train_tokens": self.tokens, "train_flops": self.flops, **curve}
