"""The teacher of a run of `pat tune`: what it may be, what it costs, and where it comes from at the milestone."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from pat import ranks
from pat.checkpoint.card import shown_name
from pat.checkpoint.places import CHECKPOINTS
from pat.data.vocabulary import Vocabulary
from pat.errors import PatError, one_line
from pat.loading import check_kind, quantization_of
from pat.loading.hub import hub_options, weights_options
from pat.loading.stored import stored_tensors
from pat.loading.tokenizer import load_plain_tokenizer
from pat.named import check_model
from pat.nll import Example
from pat.training.arguments import TuneArguments
from pat.training.distillation.distill import DistillingTrainer, Lessons, Teacher
from pat.training.distillation.lessons import LessonsOnDisk, Places, write_lessons
from pat.training.engines.engine import quantises
from pat.training.inputs.prepare import Prepared
from pat.training.run.run_file import fingerprint

logger = logging.getLogger(__name__)

OWN = "the base with the LoRA of stage one"

LITTLE_TUNED = 0.1
"""Share of the steps below which stage one is too short to teach: after 0.02 of them the small model ends 0.13 nats
worse than without a teacher (docs/experiments.md)."""


@dataclass(frozen=True)
class TeacherRecord:
    """What a small model has learnt from beside its data."""

    name: str
    """Name of the model, or `OWN`."""
    weight: float
    """Share of the divergence in the loss."""
    top_k: int | None
    """Number of tokens that were kept apart; None for the whole vocabulary."""
    cached_bytes: int
    """Size of what was kept on disk of the teacher, 0 if it was asked at each step."""
    seconds: float
    """Seconds that it took in the last sitting of a run: to be made or loaded, and to be asked."""

    def describe(self) -> str:
        """Say what it was."""
        tokens = "" if self.top_k is None else f", of its {self.top_k:,} likeliest tokens"
        return f"{self.name}, {self.weight:g} of the loss{tokens}"


def check_distillation(arguments: TuneArguments, base_config: Any) -> None:
    """Check that a run has a stage in which a small model can learn from a teacher.

    Raises:
        PatError: it has not, or its batches cannot be told row from row.
    """
    options, sft = arguments.distill, arguments.sft
    if not options.distill:
        return
    for given, obstacle, remedy in (
        (arguments.run.no_compact, "--no_compact", "leave one of them out: it is the small model that learns from it"),
        (
            quantises(arguments, base_config),
            "a quantised base",
            "expected one of 16 or 32 bits: a quantised one is not made small",
        ),
        (sft.torch_compile, "--torch_compile", "leave one of them out: a compiled model cannot be looked into"),
    ):
        if given:
            raise PatError(f"Got a teacher (--distill) with {obstacle}; {remedy}.")
    if options.distill_top_k is not None and (sft.packing or sft.padding_free):
        raise PatError(
            f"Got distill_top_k={options.distill_top_k} with rows that are packed together; leave one of them out."
        )


def check_teacher(arguments: TuneArguments, base_config: Any, vocabulary: Vocabulary) -> None:
    """Check a teacher's vocabulary, before any weights are loaded.

    Raises:
        PatError: there is no such model, or it has another vocabulary than the base; or too many tokens are asked for.
    """
    name, top_k = arguments.distill.teacher, arguments.distill.distill_top_k
    if top_k is not None and top_k > vocabulary.num_embeddings:
        raise PatError(f"Got distill_top_k={top_k}; expected at most the vocabulary, {vocabulary.num_embeddings}.")
    if name is None:
        return
    size = _config(name).get_text_config().vocab_size
    if size != vocabulary.num_embeddings:
        raise PatError(
            f"Got teacher={name} with a vocabulary of {size:,}, and the model's has {vocabulary.num_embeddings:,}; "
            "expected a teacher with the same vocabulary."
        )
    if load_plain_tokenizer(name).get_vocab() != (vocabulary.written or vocabulary.tokenizer).get_vocab():
        raise PatError(
            f"Got teacher={name}, whose tokenizer has other tokens than the model's; expected a teacher with the same "
            "tokenizer."
        )


def announce_teacher(arguments: TuneArguments, data: Prepared, base: Any, soft: int, num_steps: int) -> str:
    """Say what the teacher is and what memory it takes, and warn of one that has learnt or teaches nothing."""
    options = arguments.distill
    if not options.distill:
        return ""
    if soft >= num_steps:
        logger.warning("--distill has no effect: the milestone is at the end, and no small model is trained.")
        return ""
    if options.teacher is None and soft < LITTLE_TUNED * num_steps:
        tuned = f"has had {soft:,} of {num_steps:,} steps" if soft else "is the untuned base"
        logger.warning("The teacher %s, and knows little of the data; raise --milestone, or name a --teacher.", tuned)
    num_rows = (num_steps - soft) * arguments.sft.train_batch_size * arguments.sft.gradient_accumulation_steps
    if options.distill_top_k is not None and num_rows <= len(data.train):
        logger.warning(
            "distill_top_k=%d asks the teacher about %d rows, and stage two reads %d; leave it out to ask about those.",
            options.distill_top_k,
            len(data.train),
            num_rows,
        )
    until = "" if options.distill_top_k is None else " until it has been asked"
    if options.teacher is not None:
        return f" Teacher: {shown_name(options.teacher)}, in memory beside the small model{until}."
    size = base.get_memory_footprint() / 1e6
    return f" Teacher: {OWN}, tuned for {soft:,} steps; {size:,.0f} MB stay in memory{until}."


@dataclass
class Teaching:
    """How the small model of a run is taught, in stage two."""

    arguments: TuneArguments
    data: Prepared
    base_id: str
    """Fingerprint of the base."""
    say: Callable[[str], None]
    """Shows a line to a person."""
    kept: PeftModel | None = None
    """The masked model as of the milestone, until it begins to teach."""
    seconds: float = 0.0
    """Seconds that it took to have a teacher, or its lessons, ready."""

    @property
    def weight(self) -> float | None:
        """Share of the divergence in the loss; None without a teacher."""
        options = self.arguments.distill
        return options.distill_weight if options.distill else None

    @property
    def is_own(self) -> bool:
        """Whether the teacher is the masked model itself."""
        return self.arguments.distill.distill and self.arguments.distill.teacher is None

    def keep(self, model: PeftModel) -> None:
        """Keep the masked model as of the milestone, if it is the teacher."""
        self.kept = model if self.is_own else None

    def keep_again(self, base: Any) -> None:
        """Make the masked model as of the milestone anew from its files, if it is the teacher.

        Raises:
            PatError: they are not there.
        """
        folder = self.arguments.output_dir / "adapter"
        if self.is_own and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise PatError(f"{folder}: has no adapter left to teach; resume from a checkpoint of stage one.")
        if self.is_own:
            self.kept = PeftModel.from_pretrained(base, str(folder))

    def begin(self, trainer: Trainer) -> None:
        """Give stage two's trainer its teacher, if it is to have one.

        Raises:
            PatError: the teacher cannot be loaded.
        """
        if isinstance(trainer, DistillingTrainer):
            started = time.perf_counter()
            model, self.kept = self.kept, None  # nobody else may hold it, or it stays when its lessons are on disk
            trainer.teacher = self._lessons(model)
            self.seconds = time.perf_counter() - started

    def record(self, trainer: Trainer) -> TeacherRecord | None:
        """Return the record of a trainer's teacher, if it has one."""
        options = self.arguments.distill
        if not isinstance(trainer, DistillingTrainer):
            return None
        return TeacherRecord(
            name=OWN if options.teacher is None else shown_name(options.teacher),
            weight=options.distill_weight,
            top_k=options.distill_top_k,
            cached_bytes=trainer.teacher.num_bytes if isinstance(trainer.teacher, LessonsOnDisk) else 0,
            seconds=self.seconds + trainer.teacher_seconds,
        )

    def _lessons(self, model: PeftModel | None) -> Lessons:
        """Return the teacher, or what it says of all rows, which is written first if it is not there."""
        num, sft = self.arguments.distill.distill_top_k, self.arguments.sft
        if num is None:
            return self._teacher(model)
        rows = cast(Sequence[Example], self.data.train)
        places = Places.of(rows)
        name = places.name(num, _identity(self.arguments, model, self.base_id))
        folder = self.arguments.output_dir / CHECKPOINTS / name

        def ask() -> None:
            if folder.is_dir():
                return
            size = places.num_bytes(num)
            self.say(f"Asking the teacher for {places.num_positions:,} tokens; {size:,} bytes go to {folder}.")
            write_lessons(
                folder,
                rows,
                places,
                self._teacher(model),
                num,
                batch_size=sft.per_device_train_batch_size,
                pad_token_id=cast(int, self.data.vocabulary.tokenizer.pad_token_id),
                device=sft.device,
                autocast=partial(
                    torch.autocast,
                    sft.device.type,
                    dtype=torch.bfloat16 if sft.bf16 else torch.float16,
                    enabled=bool(sft.bf16 or sft.fp16),
                ),
                progress=not sft.disable_tqdm,
            )

        ranks.first_alone(ask)
        return LessonsOnDisk(folder, places)

    def _teacher(self, model: PeftModel | None) -> Teacher:
        return Teacher(_load(self.arguments) if model is None else model)


def _identity(arguments: TuneArguments, model: PeftModel | None, base_id: str) -> str:
    """Return what tells a teacher from another one, and what it is computed in."""
    computed = f"{arguments.model.dtype} {arguments.sft.bf16} {arguments.sft.fp16}"
    if model is None:
        name = cast(str, arguments.distill.teacher)
        return f"{name} {fingerprint(name, _config(name))} {computed}"
    with (arguments.output_dir / "adapter" / SAFETENSORS_WEIGHTS_NAME).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{base_id} {digest} {computed}"


def _config(name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(check_model(name), trust_remote_code=False, **hub_options(name))
        stored_tensors(name)  # refuses an index that names files outside the folder
    except PatError:
        raise
    except Exception as error:  # of every kind, see `load_config`
        raise PatError(f"Got teacher={name}, whose configuration cannot be read: {one_line(error)}") from error
    check_kind(name, config)
    return config


def _load(arguments: TuneArguments) -> Any:
    """Load a teacher of any family onto the trainer's device."""
    name = check_model(cast(str, arguments.distill.teacher))
    options: dict[str, Any] = {"dtype": arguments.model.dtype or "auto", **weights_options(name)}
    if arguments.model.attn_implementation is not None:
        options["attn_implementation"] = arguments.model.attn_implementation
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # files, packages that are missing, and transformers' own code
        raise PatError(f"Could not load the teacher {name!r}: {one_line(error)}") from error
    return model if quantization_of(model.config) is not None else model.to(arguments.sft.device)
