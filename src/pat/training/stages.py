"""Training in two stages: masked at full width up to the milestone, then ordinary LoRA on the compact model.

Each stage is a run of TRL's trainer with the same arguments. The second one resumes from a checkpoint that is made of
the first one's: its step count, schedule, data order and random state run on as if nothing had happened (specification,
"Compaction").
"""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

from pat.checkpoint.card import Compaction
from pat.checkpoint.compact import ADAPTER, MODEL, read_compaction, save_adapter, write_compact
from pat.errors import PatError, RunFailed
from pat.loading import TokenSetup, load_base
from pat.method.schedule import milestone_step
from pat.training.arguments import TuneArguments
from pat.training.callback import PatCallback, calibration_batches
from pat.training.checkpoints import STAGE_TWO, SaveTokens, is_compact
from pat.training.data import TrainingData
from pat.training.guard import FiniteGuard
from pat.training.handover import continue_from
from pat.tuner.compaction import check_compactable
from pat.tuner.config import PatConfig
from pat.tuner.model import PatModel, find_tuner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What training came to."""

    model: PeftModel
    """The masked model, or the compact one with its ordinary LoRA."""
    num_steps: int
    log_history: list[dict[str, Any]]
    seconds: dict[str, float]
    """By part: `preparation` (of the rows), `stage_one`, `compaction`, `stage_two`."""
    pat_config: dict[str, Any]
    compaction: Compaction | None = None


@dataclass
class Stages:
    """The training of one run of `pat tune`."""

    arguments: TuneArguments
    data: TrainingData
    tokenizer: PreTrainedTokenizerBase
    """What the trainer pads and tokenises with."""
    tokens: TokenSetup
    """What is written beside every adapter and model of the run."""
    verify_on: Sequence[Mapping[str, Any]]
    """Batches to compare the masked model and its compact form on."""
    base: PreTrainedModel | None
    """Handed over: nobody else may hold it, or it stays in memory beside the compact model."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Where stage one keeps its checkpoints."""
        return self.arguments.output_dir / "checkpoints"

    @property
    def compact_dir(self) -> Path:
        """Where the compact model is left."""
        return self.arguments.output_dir / "compact"

    def run(self, resume_from: str | None = None) -> Trained:
        """Train from the start, or from a checkpoint of either stage.

        Raises:
            PatError: the compact model that the checkpoint belongs to is not there.
            RunFailed: the loss became non-finite, or the compact model is not the masked one.
        """
        base, self.base = self.base, None
        if resume_from is not None and is_compact(resume_from):
            del base
            if self.arguments.run.no_compact:
                raise PatError(
                    f"Got --no_compact and the checkpoint {resume_from} of the compact model; leave the flag out, or "
                    "resume from a checkpoint of stage one."
                )
            return self._resume_compact(resume_from)
        pat_config = self.arguments.pat_config()
        model = cast(PeftModel, get_peft_model(cast(PreTrainedModel, base), pat_config))
        tuner = cast(PatModel, find_tuner(model))
        compacts = self._compacts(tuner)
        args = self._stage_args(self.checkpoints)
        if compacts:
            # Its last checkpoint has to hold everything, and the best one is picked among those of stage two.
            args.save_only_model, args.load_best_model_at_end = False, False
        started = time.perf_counter()
        trainer = self._trainer(model, args, [PatCallback(), *([_StopAtMilestone()] if compacts else [])])
        self.seconds["preparation"] = time.perf_counter() - started
        if not (compacts and resume_from is not None and _load_hard(trainer, tuner, resume_from)):
            if compacts and resume_from is None and _is_hard_at_once(trainer, pat_config):
                self._calibrate(trainer, tuner)
            else:
                self._train(trainer, "stage_one", resume_from)
            resume_from = None
        if not compacts or not tuner.mask().hardened or 0 < trainer.state.max_steps <= trainer.state.global_step:
            return self._trained(trainer, None, tuner.pat_config())
        config = tuner.pat_config()
        stage_two, start, record = self._compact(trainer, model, tuner, resume_from)
        # Before the small model trains, the large one has to go.
        del model, tuner, trainer, base
        gc.collect()
        self._train(stage_two, "stage_two", start)
        return self._trained(stage_two, record, config)

    # -- parts -------------------------------------------------------------------------------------------------

    def _resume_compact(self, checkpoint: str) -> Trained:
        record = read_compaction(self.compact_dir)
        options = self.arguments.model
        base: Any = load_base(
            str(self.compact_dir / MODEL), dtype=options.dtype, attn_implementation=options.attn_implementation
        )
        model = PeftModel.from_pretrained(base.to(self.arguments.sft.device), checkpoint, is_trainable=True)
        trainer = self._trainer(model, self._stage_args(self.checkpoints / STAGE_TWO), [])
        self._train(trainer, "stage_two", checkpoint)
        config = PatConfig.from_pretrained(str(self.arguments.output_dir / "adapter"))
        return self._trained(trainer, record, config)

    def _compacts(self, tuner: PatModel) -> bool:
        if self.arguments.run.no_compact:
            return False
        try:
            check_compactable(tuner.pat_config())
        except PatError as obstacle:
            logger.warning("Training goes on at full width after the milestone. %s", obstacle)
            return False
        return True

    def _stage_args(self, folder: Path) -> SFTConfig:
        args = copy.deepcopy(self.arguments.sft)
        args.output_dir = str(folder)
        return args

    def _trainer(
        self,
        model: PeftModel,
        args: SFTConfig,
        callbacks: list[TrainerCallback],
        prepared: SFTTrainer | None = None,
    ) -> SFTTrainer:
        """Make a trainer, on the datasets of one whose rows are tokenised and packed already if there is one."""
        if prepared is not None:
            args.dataset_kwargs = {**cast(dict[str, Any], args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        held_out = self.data.held_out if args.eval_strategy != "no" else None
        return SFTTrainer(
            model=model,
            args=args,
            train_dataset=self.data.train if prepared is None else prepared.train_dataset,
            eval_dataset=held_out if prepared is None else prepared.eval_dataset,
            processing_class=self.tokenizer,
            callbacks=[*callbacks, FiniteGuard(), SaveTokens(self.tokens)],
        )

    def _calibrate(self, trainer: SFTTrainer, tuner: PatModel) -> None:
        """Choose the channels before the first step, instead of stage one."""
        with self._leaving_no_empty_folders():
            if tuner.needs_calibration():
                dataloader = trainer.get_train_dataloader()
                tuner.calibrate(calibration_batches(tuner.pat_config(), dataloader, self.tokenizer))
            tuner.set_step(0, 0)

    def _train(self, trainer: SFTTrainer, part: str, resume_from: Any) -> None:
        started = time.perf_counter()
        try:
            with self._leaving_no_empty_folders():
                trainer.train(resume_from_checkpoint=resume_from or None)
        except RunFailed as error:
            last = Path(cast(str, trainer.args.output_dir)) / "last-finite"
            trainer.save_model(str(last))
            raise type(error)(f"{error} The adapter before that step is in {last}.") from error
        self.seconds[part] = time.perf_counter() - started

    @contextmanager
    def _leaving_no_empty_folders(self) -> Iterator[None]:
        """If the user's input turns out to be wrong, take back the folders that the trainer makes before it starts."""
        try:
            yield
        except PatError:
            _remove_if_empty(self.checkpoints, self.arguments.output_dir)
            raise

    def _compact(
        self, trainer: SFTTrainer, model: PeftModel, tuner: PatModel, done: str | None
    ) -> tuple[SFTTrainer, str | None, Any]:
        """Write the compact model and the adapter as of the milestone, and prepare stage two's trainer.

        `done` is the checkpoint that was loaded; by default the one that stage one has just ended with.
        """
        started = time.perf_counter()
        save_adapter(model, self.arguments.output_dir / "adapter", self.tokens)
        # Of an earlier run: its stage two belongs to other channels, and must not be what a resumed run finds.
        for folder in (self.checkpoints / STAGE_TWO, self.compact_dir):
            shutil.rmtree(folder, ignore_errors=True)
        seed = self.arguments.sft.seed
        compact, record = write_compact(
            model, tuner, self.compact_dir, tokens=self.tokens, batches=self.verify_on, seed=seed
        )
        if not self.arguments.sft.disable_tqdm:
            print(
                f"Milestone: hidden size {record.hidden_size} becomes {record.pruned_hidden_size}; training goes on as "
                "LoRA on the small model.",
                file=sys.stderr,
            )
        args = self._stage_args(self.checkpoints / STAGE_TWO)
        stage_two = self._trainer(compact.model, args, [], prepared=trainer)
        start = None
        if trainer.state.global_step > 0:
            last = Path(done) if done else self.checkpoints / f"checkpoint-{trainer.state.global_step}"
            start = str(continue_from(last, trainer, compact, stage_two))
        self.seconds["compaction"] = time.perf_counter() - started
        return stage_two, start, record

    def _trained(self, trainer: SFTTrainer, record: Compaction | None, config: Any) -> Trained:
        model = cast(PeftModel, trainer.model)
        folder = self.arguments.output_dir / "adapter" if record is None else self.compact_dir / ADAPTER
        save_adapter(model, folder, self.tokens)
        state = trainer.state
        return Trained(model, state.global_step, state.log_history, self.seconds, config.to_dict(), record)


def _is_hard_at_once(trainer: SFTTrainer, config: PatConfig) -> bool:
    """Tell whether the milestone comes to step 0 of this run."""
    values: Any = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return milestone_step(config.milestone, values[-1]) == 0


def _load_hard(trainer: SFTTrainer, tuner: PatModel, checkpoint: str) -> bool:
    """Load a checkpoint whose mask is hard already, as a run leaves it that was cut off between the stages."""
    model = cast(PeftModel, trainer.model)
    model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)
    if not tuner.mask().hardened:
        return False
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME):
        if not (Path(checkpoint) / name).is_file():
            raise PatError(
                f"{checkpoint}: has no {name}, so it cannot be gone on from; resume from another checkpoint."
            )
    trainer.create_optimizer().load_state_dict(torch.load(Path(checkpoint) / OPTIMIZER_NAME, weights_only=True))
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return True


class _StopAtMilestone(TrainerCallback):
    """Ends stage one when the mask has become hard, with a checkpoint to go on from."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, save and log (the loss since the last log would be lost); runs after `PatCallback`."""
        tuner = find_tuner(kwargs["model"])
        if tuner is not None and tuner.mask().hardened:
            control.should_training_stop = control.should_save = control.should_log = True


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
