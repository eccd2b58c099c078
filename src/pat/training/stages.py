"""Training in two stages: masked at full width up to the milestone, then ordinary LoRA on the compact model.

Each stage is a run of TRL's trainer with the same arguments. The second one resumes from a checkpoint that is made of
the first one's: its step count, schedule, data order and random state run on as if nothing had happened
(docs/adr/0008).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pat import ranks
from pat.checkpoint.card import Compaction
from pat.checkpoint.compact import read_compaction, write_compact
from pat.checkpoint.places import ADAPTER, CHECKPOINTS, COMPACT, MODEL, STAGE_TWO
from pat.checkpoint.staging import discard
from pat.errors import Diverged, PatError
from pat.loading import TokenSetup
from pat.method.schedule import milestone_step
from pat.report.progress import phase, say
from pat.training.arguments import TuneArguments
from pat.training.base import load_compact, with_adapter
from pat.training.callbacks.callback import PatCallback
from pat.training.callbacks.guard import FiniteGuard
from pat.training.callbacks.interrupt import StopOnSignal
from pat.training.callbacks.watch import Watch, silence
from pat.training.distillation.teacher import Teaching
from pat.training.engines.handover import checkpoint_for, is_sharded, unsharded, write_adapter
from pat.training.inputs.prepare import Prepared
from pat.training.preflight.check import compacts, warn_without_rotation
from pat.training.run.base_scores import BaseScores
from pat.training.run.beginning import begun
from pat.training.run.checkpoints import check_fit, continue_from, is_compact, load_finished, load_hard, taken_from
from pat.training.run.folder import Start
from pat.training.run.run_file import RunFile
from pat.training.run.sittings import Clock, SaveSeconds
from pat.training.run.trained import Trained, last_adapter, training_facts
from pat.training.trainer import (
    KeepLog,
    SaveTokens,
    StopAtMilestone,
    make_trainer,
    restore_router_settings,
    router_settings,
)
from pat.tuner.compaction import CompactModel
from pat.tuner.config import PatConfig
from pat.tuner.model import PatModel, find_tuner

logger = logging.getLogger(__name__)

TITLES = {"stage_one": "Training", "stage_two": "Training the small model"}
"""What is shown of a stage while it runs."""


@dataclass
class Stages:
    """The training of one run of `pat tune`."""

    arguments: TuneArguments
    data: Prepared
    tokens: TokenSetup
    """Files about tokens, which are written beside every adapter and model of the run."""
    run_file: RunFile
    num_steps: int
    """Optimizer steps of both stages together."""
    base: PreTrainedModel | None
    """Base model. Nobody else may hold it, or it stays in memory beside the compact model."""
    load_again: Callable[[], PreTrainedModel]
    """Loads the base model anew: an engine that shards it leaves nobody with a whole one."""
    base_scores: BaseScores
    """Figures of the base model, which are kept among the checkpoints."""
    callbacks: Sequence[TrainerCallback] = ()
    """Further callbacks of both trainers."""
    router_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the model's configuration that its trainer has changed for itself."""

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.clock.add("preparation", self.data.seconds)
        self.teaching = Teaching(self.arguments, self.data, self.run_file.base, say)

    @property
    def checkpoints(self) -> Path:
        """Folder of stage one's checkpoints."""
        return self.arguments.output_dir / CHECKPOINTS

    @property
    def compact_dir(self) -> Path:
        """Folder of the compact model."""
        return self.arguments.output_dir / COMPACT

    def run(self, start: Start) -> Trained:
        """Train from the beginning or from a checkpoint of either stage, or return what is trained already.

        Raises:
            PatError: the compact model that the checkpoint belongs to is not there.
            RunFailed: the loss became non-finite, the compact model is not the masked one, or a signal has come.
        """
        base, self.base = self.base, None
        if start.is_trained:
            return self._again(base)
        resume_from = start.checkpoint
        self.clock.go_on(resume_from)
        if resume_from is not None and is_compact(resume_from):
            if self.arguments.run.no_compact:
                raise PatError(
                    f"Got --no_compact and the checkpoint {resume_from} of the compact model; leave the flag out, or "
                    "resume from a checkpoint of stage one."
                )
            self.teaching.keep_again(base)
            del base
            return self._resume_compact(resume_from)
        pat_config = self.data.vocabulary.note(self.arguments.pat_config(), cast(PreTrainedModel, base).config)
        revision = self.arguments.model.model_revision
        model = cast(PeftModel, get_peft_model(cast(PreTrainedModel, base), pat_config, revision=revision))
        tuner = cast(PatModel, find_tuner(model))
        warn_without_rotation(tuner)
        goes_small = compacts(self.arguments.run.no_compact, tuner.pat_config(), warns=True)
        callback = PatCallback()
        args = self.data.trainer_args(self.arguments.sft)
        if goes_small:
            # Its last checkpoint has to hold everything, and the best one is picked among those of stage two.
            args.save_only_model, args.load_best_model_at_end = False, False
        trainer = self._trainer(model, args, self.checkpoints, callback, *([StopAtMilestone()] if goes_small else []))
        if not (goes_small and resume_from is not None and load_hard(trainer, tuner, resume_from)):
            if goes_small and resume_from is None and not milestone_step(tuner.pat_config().soft_share, self.num_steps):
                self._skip(trainer, callback)
            else:
                self._train(trainer, "stage_one", resume_from)
            resume_from = None
        if not goes_small or not tuner.mask().hardened or 0 < trainer.state.max_steps <= trainer.state.global_step:
            return self._trained(trainer, None, tuner.pat_config())
        config = tuner.pat_config()
        stage_two, resume_from, record = self._compact(trainer, model, tuner, resume_from)
        # Before the small model trains, the large one has to go, unless that learns from it.
        self.teaching.keep(model)
        del model, tuner, trainer, base
        gc.collect()
        self.teaching.begin(stage_two)
        self._train(stage_two, "stage_two", resume_from)
        return self._trained(stage_two, record, config)

    # -- parts -------------------------------------------------------------------------------------------------

    def _again(self, base: PreTrainedModel | None) -> Trained:
        """Return what the folder holds of a training that is over."""
        folder = last_adapter(self.arguments.output_dir)
        facts = training_facts(self.arguments.output_dir, self.num_steps)
        with taken_from(folder):
            model = self._load_compact(folder) if folder.parent == self.compact_dir else with_adapter(base, folder)
        return Trained.of(cast(dict[str, Any], facts), model, self.run_file, self.arguments.output_dir)

    def _load_compact(self, adapter: str | Path) -> PeftModel:
        return load_compact(self.arguments, self.compact_dir / MODEL, adapter)

    def _resume_compact(self, checkpoint: str) -> Trained:
        record = read_compaction(self.compact_dir)
        with taken_from(checkpoint):
            model = self._load_compact(checkpoint)
        trainer = self._trainer(model, self.data.trainer_args(self.arguments.sft), self.checkpoints / STAGE_TWO)
        self.teaching.begin(trainer)
        self._train(trainer, "stage_two", checkpoint)
        config = PatConfig.from_pretrained(str(self.arguments.output_dir / ADAPTER))
        config.inference_mode = False  # as it was when it was saved
        return self._trained(trainer, record, config)

    def _trainer(self, model: PeftModel, args: SFTConfig, folder: Path, *callbacks: TrainerCallback) -> SFTTrainer:
        self.router_settings = router_settings(model.config)
        weight = self.teaching.weight if folder.name == STAGE_TWO else None
        callbacks = (*callbacks, FiniteGuard(), SaveSeconds(self.clock), SaveTokens(self.tokens))
        args.disable_tqdm = True  # `Watch` shows the training
        trainer = make_trainer(model, args, self.data, folder, callbacks=callbacks, distill_weight=weight)
        silence(trainer)
        return trainer

    def _skip(self, trainer: SFTTrainer, callback: PatCallback) -> None:
        """Have the channels chosen, and the mask hard, without a step of stage one."""
        trainer.state.max_steps = self.num_steps
        with self._begun(), self.clock.timing("calibration"):
            callback.on_train_begin(
                trainer.args,
                trainer.state,
                trainer.control,
                model=trainer.model,
                train_dataloader=trainer.get_train_dataloader(),
                processing_class=self.data.vocabulary.tokenizer,
            )

    def _train(self, trainer: SFTTrainer, part: str, resume_from: str | None) -> None:
        stop, watch = StopOnSignal(self.arguments.run.same_command), Watch(TITLES[part])
        for callback in (*self.callbacks, stop):
            trainer.add_callback(callback)
        try:
            with self.clock.timing(part), self._begun(), stop.listening(trainer), watch.watching(trainer):
                if resume_from is None or not load_finished(trainer, resume_from, self.num_steps):
                    if resume_from is not None:
                        resume_from = str(ranks.first(partial(checkpoint_for, Path(resume_from), trainer)))
                        check_fit(trainer, Path(resume_from))
                    trainer.train(resume_from_checkpoint=resume_from)
        except Diverged as error:
            last = Path(cast(str, trainer.args.output_dir)) / "last-finite"
            trainer.save_model(str(last))
            raise type(error)(f"{error} The adapter before that step is in {last}.") from error
        self._finished(part)

    def _finished(self, part: str) -> None:
        self.run_file = self.run_file.after(part)
        ranks.first_alone(lambda: self.run_file.write(self.arguments.output_dir))

    def _begun(self) -> AbstractContextManager[None]:
        return begun(self.arguments.output_dir, self.run_file, self.base_scores)

    def _compact(
        self, trainer: SFTTrainer, model: PeftModel, tuner: PatModel, done: str | None
    ) -> tuple[SFTTrainer, str | None, Any]:
        """Write the compact model and the adapter as of the milestone, and prepare stage two's trainer.

        `done` is the checkpoint that was loaded; by default the one that stage one has just ended with.
        """
        with self.clock.timing("compaction"):
            restore_router_settings(model.config, self.router_settings)
            adapter = self.arguments.output_dir / ADAPTER
            write_adapter(trainer, adapter, self.tokens, grown=bool(self.data.vocabulary.added))
            written: list[tuple[PeftModel, CompactModel, Compaction]] = []
            ranks.first_alone(lambda: written.append(self._write_compact(trainer, adapter)))
            # The first process goes on with what it has made, the others with what it has written.
            record = ranks.first(lambda: written[0][2])
            small = written[0][1].model if written else self._load_compact(self.compact_dir / ADAPTER)
            say(f"Milestone: {record.describe()}; training goes on as LoRA on the small model.")
            args = self.data.trainer_args(self.arguments.sft)
            stage_two = self._trainer(small, args, self.checkpoints / STAGE_TWO)
            start = None
            if trainer.state.global_step == 0:  # there is no checkpoint to take the log along
                stage_two.add_callback(KeepLog(trainer.state.log_history))
            else:
                last = Path(done) if done else self.checkpoints / f"checkpoint-{trainer.state.global_step}"
                seconds = self.clock.seconds()
                start = ranks.first(
                    lambda: str(continue_from(last, trainer, written[0][1], written[0][0], stage_two, seconds))
                )
        self._finished("compaction")
        return stage_two, start, record

    def _write_compact(self, trainer: SFTTrainer, adapter: Path) -> tuple[PeftModel, CompactModel, Compaction]:
        """Write the compact model; return what it was made of, it, and the record of that."""
        # Of an earlier run: its stage two belongs to other channels, and must not be what a resumed run finds.
        for folder in (self.checkpoints / STAGE_TWO, self.compact_dir):
            discard(folder)
        masked = with_adapter(self.load_again(), adapter) if is_sharded(trainer) else cast(PeftModel, trainer.model)
        with phase("Writing the small model, and comparing it with the masked one"):
            compact, record = write_compact(
                masked,
                cast(PatModel, find_tuner(masked)),
                self.compact_dir,
                tokens=self.tokens,
                batches=self.data.verify_on,
                seed=self.arguments.sft.seed,
            )
        return masked, compact, record

    def _trained(self, trainer: SFTTrainer, record: Compaction | None, config: Any) -> Trained:
        model = cast(PeftModel, trainer.model)
        restore_router_settings(model.config, self.router_settings)
        state = trainer.state
        data, about = self.data.read(state.global_step * (self.run_file.rows_per_step or 0), state.epoch or 0.0)
        counts_padding = self.arguments.sft.include_num_input_tokens_seen == "all"  # as the user asked
        trained = Trained(
            model,
            state.global_step,
            state.epoch or 0.0,
            state.log_history,
            self.clock.seconds(),
            config.to_dict(),
            self.run_file,
            data,
            about if counts_padding else state.num_input_tokens_seen or about,
            record,
            self.teaching.record(trainer),
        )
        folder = self.arguments.output_dir / ADAPTER if record is None else self.compact_dir / ADAPTER
        grown = bool(self.data.vocabulary.added)
        write_adapter(trainer, folder, self.tokens, grown=grown, also=lambda path: trained.write(path, self.num_steps))
        whole = self._load_compact if record is not None else lambda path: with_adapter(self.load_again(), path)
        return replace(trained, model=unsharded(trainer, lambda: whole(folder)))
