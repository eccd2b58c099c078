"""TRL's trainer, as both stages and the rehearsal make it."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from pat import ranks
from pat.checkpoint.staging import make_readable, sync
from pat.loading import TokenSetup
from pat.training.callbacks.callback import complete_head
from pat.training.distillation.distill import DistillingTrainer
from pat.training.engines.accelerated import has_deepspeed
from pat.training.inputs.prepare import Prepared
from pat.tuner.model import find_tuner

FEWEST_LOGS = 10
"""Times that a run logs its loss, if it has as many steps: fewer points make no curve."""

FEWEST_SAVES = 10
"""Times that a run writes a checkpoint, if it has as many steps: an interruption costs a tenth of it at most."""

KEPT_CHECKPOINTS = 2
"""Checkpoints of a run that are kept: the last one, and one before it in case that is torn."""

_OPTIONS_OF_SAVING = ("save_steps", "save_strategy", "save_total_limit", "load_best_model_at_end")

_ROUTER_SETTINGS = ("output_router_logits", "router_aux_loss_coef", "num_experts")


def make_trainer(
    model: PeftModel,
    args: SFTConfig,
    data: Prepared,
    folder: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    distill_weight: float | None = None,
) -> SFTTrainer:
    """Make a trainer on prepared data, with a folder for its checkpoints; its arguments are not copied.

    It changes the tokenizer, which is that of the data unless another one is given. With a weight it is one that learns
    from a teacher as well, which is to be set.
    """
    complete_head(model)
    config: Any = model.config
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        config.num_experts = config.num_local_experts  # TRL's router loss asks every mixture of experts by this name
    args.output_dir = str(folder)
    if has_deepspeed():
        args.deepspeed_plugin = None  # accelerate takes it from the first trainer alone
    evaluation: Dataset | None = data.evaluation
    parts: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": data.train if data.stream is None else data.stream.dataset(),
        "eval_dataset": evaluation,
        "processing_class": tokenizer or data.vocabulary.tokenizer,
        "callbacks": [*callbacks],
    }
    return SFTTrainer(**parts) if distill_weight is None else DistillingTrainer(**parts, distill_weight=distill_weight)


def router_settings(config: Any) -> dict[str, Any]:
    """Return what a configuration says of the router's loss, which a trainer sets for itself."""
    return {name: vars(config)[name] for name in _ROUTER_SETTINGS if name in vars(config)}


def restore_router_settings(config: Any, settings: dict[str, Any]) -> None:
    """Put back what a configuration said of the router's loss, before it is written."""
    for name in _ROUTER_SETTINGS:
        vars(config).pop(name, None)
    vars(config).update(settings)


def count_steps(trainer: SFTTrainer) -> int:
    """Return the number of optimizer steps that a trainer will take."""
    values: Any = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(values[-1])


def log_and_save_often(sft: SFTConfig, num_steps: int, given: Container[str]) -> None:
    """Have a short run log as often as a curve needs, and save so that little is lost, unless it was told how often."""
    if "logging_steps" not in given:
        sft.logging_steps = min(sft.logging_steps, math.ceil(num_steps / FEWEST_LOGS))
    if not any(name in given for name in _OPTIONS_OF_SAVING):
        sft.save_steps = min(sft.save_steps, math.ceil(num_steps / FEWEST_SAVES))
        if "keep_checkpoints" not in given:
            sft.save_total_limit = KEPT_CHECKPOINTS


class StopAtMilestone(TrainerCallback):
    """Ends stage one when the mask has become hard, with a checkpoint to go on from."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, save and log (the loss since the last log would be lost); runs after `PatCallback`."""
        tuner = find_tuner(kwargs["model"])
        if tuner is not None and tuner.mask().hardened:
            control.should_training_stop = control.should_save = control.should_log = True


class KeepLog(TrainerCallback):
    """Puts what was logged before a training at the head of its log."""

    def __init__(self, log_history: list[dict[str, float]]) -> None:
        self.log_history = log_history

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put it there; from then on every checkpoint holds it."""
        state.log_history[:0] = self.log_history


class SaveTokens(TrainerCallback):
    """Writes what belongs to a run's tokens into every checkpoint; the trainer's own tokenizer has had to be padded."""

    def __init__(self, tokens: TokenSetup) -> None:
        self.tokens = tokens

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write tokenizer and generation config, and have the whole checkpoint on the disk before training goes on."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        ranks.wait()  # each process writes its random state
        ranks.first_alone(lambda: self._complete(folder))

    def _complete(self, folder: Path) -> None:
        self.tokens.save(folder)
        make_readable(folder)
        sync(folder)
