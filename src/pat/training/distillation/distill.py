"""Learning from a teacher: a mixin for trainers, with which a model learns from its labels and from a larger model.

    L = (1 - weight) * (the trainer's own loss) + weight * KL(teacher ‖ student)

The divergence is taken over the tokens that the labels name, at temperature 1, over the whole vocabulary, in float32,
and normalised as the trainer normalises its own loss. Shapes: B rows, T tokens, D hidden channels, N scored positions
of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import MoeModelOutputWithPast
from trl import SFTTrainer

from pat.method.divergence import divergence
from pat.nll import IGNORED
from pat.ranges import check_range
from pat.training.options import DISTILL_WEIGHTS
from pat.tuner.switch import without_pruning

ROWS = 1024
"""Number of positions whose logits are in memory at a time, in more than one part they are computed twice."""

LOGGED = "distill/kl"
"""Name under which the mean divergence, in nats per token, is logged beside the loss."""


class Lessons(Protocol):
    """What a teacher says of the scored positions of a batch, from a model or from a file."""

    def look(self, inputs: Mapping[str, Any], scored_BT: Tensor) -> tuple[Tensor, ...]:
        """Return what `divergence` needs, one tensor or several whose first dimension is N.

        Args:
            inputs: what the student reads, without labels.
            scored_BT: the positions whose next token is to be learned, the last of a row never.
        """

    def divergence(self, logits_NV: Tensor, *looked: Tensor) -> Tensor:
        """Return the divergence of a student's logits from what `look` returned, summed over positions."""


class Teacher:
    """A model to learn from: a causal language model, also with adapters, frozen and in eval mode from now on.

    Of a PAT adapter the pruning is switched off while it teaches, so that it is the base with its LoRA.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._causal = causal_model(model)
        self._head = Head(self._causal)

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Any], scored_BT: Tensor) -> tuple[Tensor, ...]:
        """Return the last hidden states of the scored positions, of shape `(N, D)`."""
        with without_pruning(self._causal):
            states_BTD = decoder(self._causal)(**{**inputs, "use_cache": False}).last_hidden_state
        return (states_BTD[scored_BT],)

    @torch.no_grad()
    def logits(self, states_ND: Tensor) -> Tensor:
        """Return the logits of hidden states, of shape `(N, V)`."""
        return self._head(states_ND)

    def divergence(self, logits_NV: Tensor, *looked: Tensor) -> Tensor:
        """Return KL(teacher ‖ student), summed over positions."""
        return divergence(logits_NV, self.logits(*looked))


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class DistillationMixin(_Trainer):
    """Mixin that makes a trainer of causal language models (transformers' or TRL's) learn from a teacher as well.

    Example:
        `class Distilling(DistillationMixin, SFTTrainer): ...`, then
        `Distilling(model=model, ..., teacher=Teacher(large), distill_weight=0.5)`.

    Evaluation is the trainer's own: what is said there is the loss of the labels alone. The mean divergence is logged
    as `distill/kl`. One process or several with DDP; a model that is compiled or sharded cannot be looked into.

    Args:
        args: of the trainer.
        teacher: to learn from, over the same vocabulary; its model lies on the trainer's device. It can be set later as
            the attribute `teacher`; without one the loss is the trainer's own.
        distill_weight: share of the divergence in the loss, in (0, 1].
        kwargs: of the trainer.

    Raises:
        PatError: the weight is out of range.
    """

    def __init__(self, *args: Any, teacher: Lessons | None = None, distill_weight: float = 0.5, **kwargs: Any) -> None:
        check_range("distill_weight", distill_weight, DISTILL_WEIGHTS, whole=False)
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.distill_weight = distill_weight
        self.teacher_seconds = 0.0
        """Seconds that the teacher has taken."""
        self._student_head = Head(causal_model(self.accelerator.unwrap_model(self.model)))
        self._divergences: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mixed loss of a training batch; see `Trainer.compute_loss`."""
        labels_BT = inputs.get("labels")
        if self.teacher is None or not model.training or labels_BT is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scored_BT = scored_positions(labels_BT)
        looked = self._look(self.teacher, inputs, scored_BT)
        student = causal_model(self.accelerator.unwrap_model(model))
        with captured_states(student) as states:
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = summed_divergence(self.teacher, self._student_head, states[0][scored_BT], looked)
        # As the trainer counts: over the accumulated batch where it knows of that, else over this one.
        num_tokens = scored_BT.sum() if num_items_in_batch is None else num_items_in_batch
        mean = total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            mean = mean * self.accelerator.num_processes
        self._divergences.append(torch.stack([total.detach(), scored_BT.sum().to(total)]))
        loss = (1 - self.distill_weight) * (found[0] if return_outputs else found) + self.distill_weight * mean
        return (loss, found[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean divergence since the last time beside the loss."""
        if "loss" in logs and self._divergences:
            total, num_tokens = torch.stack(self._divergences).sum(dim=0).tolist()
            logs[LOGGED] = total / max(num_tokens, 1.0)
            self._divergences.clear()
        super().log(logs, *args, **kwargs)

    def _look(self, teacher: Lessons, inputs: Mapping[str, Any], scored_BT: Tensor) -> tuple[Tensor, ...]:
        """Ask the teacher, and note how long it takes."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        _wait_for(scored_BT.device)
        started = time.perf_counter()
        looked = teacher.look(inputs, scored_BT)
        _wait_for(scored_BT.device)
        self.teacher_seconds += time.perf_counter() - started
        return looked


class DistillingTrainer(DistillationMixin, SFTTrainer):
    """TRL's supervised trainer, with a teacher."""


class Head:
    """What a causal language model makes of its last hidden states, scales and caps of its family included.

    It is the model's own forward around a stub in the place of the decoder. Fused heads (TRL's) show no logits, and not
    every family's logits are the head's output.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = copy.deepcopy(model.config)
        if hasattr(config.get_text_config(), "output_router_logits"):
            config.get_text_config().output_router_logits = False
        with torch.device("meta"):
            self._shell = cast(Any, type(model))(config)
        setattr(self._shell, self._shell.base_model_prefix, _Stub())
        self._shell.set_output_embeddings(model.get_output_embeddings())

    def __call__(self, states_ND: Tensor) -> Tensor:
        """Return the logits, of shape `(N, V)`."""
        return cast(Tensor, self._shell(inputs_embeds=states_ND[None], use_cache=False).logits[0])


class _Stub(nn.Module):
    """Decoder whose last hidden states are what it is given as embeddings."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # has what other outputs have as well


def summed_divergence(teacher: Lessons, head: Head, states_ND: Tensor, looked: tuple[Tensor, ...]) -> Tensor:
    """Return the divergence over a student's hidden states from what a teacher said, summed over positions."""

    def part(states: Tensor, *seen: Tensor) -> Tensor:
        return teacher.divergence(head(states), *seen)

    if len(states_ND) <= ROWS:
        return part(states_ND, *looked)
    total = states_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, len(states_ND), ROWS):
        rows = slice(start, start + ROWS)
        seen = (tensor[rows] for tensor in looked)
        total = total + cast(Tensor, checkpoint(part, states_ND[rows], *seen, use_reentrant=False))
    return total


def causal_model(model: Any) -> PreTrainedModel:
    """Return a causal language model without the wrapper of its adapters."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that makes hidden states."""
    return model.base_model


@contextmanager
def captured_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of each forward pass, of shape `(B, T, D)`."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    handle = decoder(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def scored_positions(labels_BT: Tensor) -> Tensor:
    """Return where the next token is to be learned, a mask of the labels' shape."""
    scored_BT = (labels_BT != IGNORED).roll(-1, dims=-1)
    scored_BT[..., -1] = False
    return scored_BT


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":  # else what is measured is how fast work is handed out
        torch.accelerator.synchronize(device)
