"""About how long a run takes: what its base was seen to take on this machine, times what there is to do."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME

from pat import ranks
from pat.loading import empty_model
from pat.nll import Example, batches_from_examples, evaluating
from pat.report.progress import phase
from pat.surgery.describe import head_dim
from pat.training.arguments import TuneArguments
from pat.training.check import Checked
from pat.training.checkpoints import is_compact
from pat.training.folder import Start
from pat.training.prepare import Prepared
from pat.training.results import ModelFigures

PASSES = 3.0
"""A training step takes about as long as this many forward passes over its tokens: one there, one back through the
frozen weights, and as much again for the adapter and the optimizer."""

NUM_SAMPLED = 64
"""Batches of the training whose lengths are looked at."""

PLACES = (0.5, 0.25, 0.75)
"""Places of the batches that are timed, as shares of their number by length. The middle one comes first: where a pass
takes long, it is the only one."""

SECONDS_TO_TIME = 3.0
"""No further batch is timed once so many seconds are gone."""

SECONDS_WITHOUT_WARMTH = 0.5
"""A pass that takes longer is not done again: what its allocations take no longer matters."""

BYTES_PER_TOKEN = 4
"""Bytes of a text to calibrate on for each of its tokens, about."""

ORDERING_FLOPS = 15.0
"""Operations of float32 that take as long as ordering and refitting the n channels before a writer in float64, as a
multiple of n^3: an inverse takes 2 n^3, the rounds of elimination and the refit half as much, and float64 at least
twice as long. Measured on a CPU with 1,536 channels."""

COMPARING = 1.5
"""How much longer two models are compared than they read: over the whole vocabulary, beside folding and writing."""

RANGE = (0.75, 1.5)
"""A run may take from and to so many times what was reckoned: the machine does other things meanwhile, and the share of
a step that is not the forward pass differs between machines."""


@dataclass(frozen=True)
class Seen:
    """Figures of the base, and the seconds that they took in this sitting."""

    figures: ModelFigures
    scoring_seconds: float
    """Seconds to score the held-out rows and the general text."""
    answering_seconds: float
    """Seconds to answer the prompts that are shown."""


@dataclass(frozen=True)
class Reading:
    """Tokens that all processes together are to read to choose channels, as far as there is text."""

    rotation: int = 0
    """For the basis, or the order, of the residual stream."""
    refit: int = 0
    """For the order of the channels before the writers, and for what makes up for those that are cut."""
    layers: int = 0
    """For the order of the layers: these are read once for each layer."""


@dataclass(frozen=True)
class ToDo:
    """Steps, text and comparisons that a run still has before it."""

    soft_steps: int = 0
    """Steps at the base's width."""
    small_steps: int = 0
    """Steps at the width of what is written."""
    reading: Reading = Reading()
    """Tokens that are read to choose channels."""
    goes_small: bool = True
    """Whether steps after the milestone are taken, and the tuned model is scored, at that width."""
    compacts: bool = False
    """Whether the small model is still to be made."""

    @classmethod
    def of(cls, start: Start, soft: int, num_steps: int, reading: Reading, *, goes_small: bool) -> ToDo:
        """Return what is left from where a run begins."""
        if start.is_trained:
            return cls(goes_small=goes_small)
        done = steps_done(start)
        is_small = start.checkpoint is not None and is_compact(start.checkpoint)
        return cls(
            soft_steps=max(0, soft - done),
            small_steps=max(0, num_steps - max(soft, done)),
            reading=reading if not done else Reading(refit=reading.refit if done < soft else 0),
            goes_small=goes_small,
            compacts=goes_small and not is_small,
        )


def steps_done(start: Start) -> int:
    """Return the number of steps that a run begins after."""
    if start.checkpoint is None:
        return 0
    try:
        state = json.loads((Path(start.checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def expected_seconds(
    arguments: TuneArguments, checked: Checked, data: Prepared, model: Any, seen: Seen, todo: ToDo
) -> float:
    """Return about how many seconds are left of a run, in this process.

    Args:
        arguments: of the run.
        checked: what was found out about its base.
        data: what was found out about its data.
        model: the base.
        seen: what it has taken so far.
        todo: what is left.
    """
    small = 1.0 - checked.shape.pruning_ratio
    tuned = small if todo.goes_small else 1.0
    batches = sample_batches(arguments, data)
    lengths = [[length for _, length in batch] for batch in batches]
    real, padded = np.mean([(sum(of), num_padded(arguments, of)) for of in lengths], axis=0).tolist()
    each = seconds_per_token(arguments, data, model, batches)
    passes = PASSES + (1 if arguments.sft.gradient_checkpointing else 0)
    taught = 1 if arguments.distill.distill else 0  # a forward pass of the teacher
    steps = passes * todo.soft_steps + (passes * tuned + taught) * todo.small_steps
    seconds = steps * arguments.sft.gradient_accumulation_steps * padded * each
    # What is read or compared runs in the base's own number format, as the scoring did.
    scored = sum(len(row["input_ids"]) for row in _scored(data))
    per_token = seen.scoring_seconds / scored if scored else each
    reading = _of_this_process(arguments, data, todo.reading)
    num_read = reading.rotation + reading.refit + reading.layers * checked.shape.size("layers")
    filled = padded / real if arguments.pat.calibration is None else 1.0
    seconds += num_read * filled * each + _choosing(checked, reading.refit, per_token, seen.figures.flops_per_token)
    verified = sum(int(batch["input_ids"].numel()) for batch in data.verify_on)
    comparisons = (1 + small if todo.compacts else 0) + tuned + small
    seconds += COMPARING * comparisons * verified * per_token
    return float(seconds + (tuned + small) * seen.scoring_seconds + small * seen.answering_seconds)


def span(seconds: float) -> str:
    """Return a duration that is reckoned, in words: from what to what it may be."""
    low, high = (factor * seconds for factor in RANGE)
    if high < 60:
        return "less than a minute"
    size, unit = (3600.0, "hours") if low >= 1.5 * 3600 else (60.0, "minutes")
    first, last = max(1, round(low / size)), max(2, round(high / size))
    return f"{first:,} to {last:,} {unit}"


Batch = Sequence[tuple[int, int]]
"""Places of the rows of a batch in the data, and their numbers of tokens."""


def sample_batches(arguments: TuneArguments, data: Prepared) -> list[Batch]:
    """Return some batches of rows like those that the trainer makes, without disturbing what is random."""
    sft = arguments.sft
    rows = np.random.default_rng(0).permutation(len(data.train))
    size = min(sft.per_device_train_batch_size, len(rows))
    rows = rows[: max(1, len(rows) // size) * size][: NUM_SAMPLED * size]
    chosen = [(int(row), len(ids)) for row, ids in zip(rows, data.train.select(rows)["input_ids"], strict=True)]
    if sft.train_sampling_strategy == "group_by_length":
        chosen.sort(key=lambda pair: pair[1])
    return [chosen[at : at + size] for at in range(0, len(chosen), size)]


def num_padded(arguments: TuneArguments, lengths: Sequence[int]) -> int:
    """Return the number of tokens, padding included, that a batch of rows of these lengths has."""
    sft = arguments.sft
    if sft.padding_free or (sft.packing and sft.packing_strategy != "wrapped"):
        return sum(lengths)
    multiple = sft.pad_to_multiple_of if isinstance(sft.pad_to_multiple_of, int) else 1
    return -(-max(lengths) // multiple) * multiple * len(lengths)


@torch.no_grad()
def seconds_per_token(arguments: TuneArguments, data: Prepared, model: Any, batches: Sequence[Batch]) -> float:
    """Return the seconds that the base takes to read a token, or its padding, in the arithmetic of the training.

    Args:
        arguments: of the run.
        data: what was found out about its data.
        model: the base.
        batches: of which some are timed.
    """
    sft, device = arguments.sft, model.device
    padding = cast(int, data.vocabulary.tokenizer.pad_token_id)
    dtype = torch.float16 if sft.fp16 else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=bool(sft.fp16 or sft.bf16))
    ordered = sorted(batches, key=lambda batch: num_padded(arguments, [length for _, length in batch]))
    seconds, num_tokens = 0.0, 0
    begun = time.perf_counter()
    with phase("Timing the base model"), evaluating(model), autocast:
        for place in PLACES:
            rows = data.train.select([row for row, _ in ordered[int(place * len(ordered))]]).to_list()
            batch = next(iter(batches_from_examples(rows, batch_size=len(rows), pad_token_id=padding)))
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            for _ in range(2):  # the first one allocates
                started = time.perf_counter()
                logits = model(**inputs, use_cache=False).logits
                float(logits[0, -1, 0])  # waits for the device
                taken = time.perf_counter() - started
                if taken > SECONDS_WITHOUT_WARMTH:
                    break
            seconds, num_tokens = seconds + taken, num_tokens + batch["input_ids"].numel()
            if time.perf_counter() - begun > SECONDS_TO_TIME:
                break
    return seconds / num_tokens


def _of_this_process(arguments: TuneArguments, data: Prepared, asked: Reading) -> Reading:
    """Return what one process reads: each time the text begins anew, and has no more tokens than it has."""
    path = arguments.pat.calibration
    there: float = math.inf if data.stream is not None else data.num_tokens
    if path is not None:
        there = os.path.getsize(path) // BYTES_PER_TOKEN
    own = {name: int(min(num_tokens, there)) // ranks.num_processes() for name, num_tokens in asdict(asked).items()}
    return Reading(**own)


def _choosing(checked: Checked, num_read: int, per_token: float, flops_per_token: float | None) -> float:
    """Return the seconds for the second moments of what goes into the writers, and for what is made of them.

    Args:
        checked: what was found out about the base.
        num_read: tokens that this process reads for it.
        per_token: seconds that the base takes for a token.
        flops_per_token: operations that it takes for one.
    """
    if not num_read or not flops_per_token:
        return 0.0
    config, shape = checked.base_config.get_text_config(), checked.shape
    flops = 0.0
    if shape.cuts("mlp"):
        width = shape.size("mlp")
        num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        num_routed = config.num_experts_per_tok if num_experts > 1 else 1  # experts that see a token
        flops += 2.0 * num_read * num_routed * width**2 + ORDERING_FLOPS * num_experts * width**3
    if shape.cuts("heads"):
        width = head_dim(empty_model(checked.base_config)) * config.num_attention_heads
        flops += 2.0 * num_read * width**2 + ORDERING_FLOPS * width**3
    return float(shape.size("layers") * flops * per_token / flops_per_token)


def _scored(data: Prepared) -> Iterable[Example]:
    return [*data.held_out, *(() if data.general is None else data.general.windows)]
