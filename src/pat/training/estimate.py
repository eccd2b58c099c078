"""About how long a run takes: what its base takes on this machine for a few batches, times what there is to do."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME

from pat import ranks
from pat.loading import empty_model
from pat.nll import Example, batches_from_examples, evaluating
from pat.report.progress import phase
from pat.surgery.costs import build_skeleton, cost_of, usual_context
from pat.surgery.describe import head_dim
from pat.training.arguments import TuneArguments
from pat.training.check import Checked
from pat.training.checkpoints import is_compact
from pat.training.folder import Start
from pat.training.prepare import Prepared
from pat.training.samples import MAX_NEW_TOKENS, NUM_PROMPTS

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
class Speed:
    """Seconds that the base takes on this machine."""

    training: float
    """Seconds to read a token, or its padding, in the arithmetic of the training."""
    reading: float
    """Seconds to read one in the base's own number format, in which models are scored and compared."""
    writing: float
    """Seconds to read a single token, which is about what it takes to write one."""


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
    measures_base: bool = False
    """Whether the base is still to be scored, and to answer."""

    @classmethod
    def of(
        cls, start: Start, soft: int, num_steps: int, reading: Reading, *, goes_small: bool, measures_base: bool
    ) -> ToDo:
        """Return what is left from where a run begins."""
        if start.is_trained:
            return cls(goes_small=goes_small, measures_base=measures_base)
        done = steps_done(start)
        is_small = start.checkpoint is not None and is_compact(start.checkpoint)
        return cls(
            soft_steps=max(0, soft - done),
            small_steps=max(0, num_steps - max(soft, done)),
            reading=reading if not done else Reading(refit=reading.refit if done < soft else 0),
            goes_small=goes_small,
            compacts=goes_small and not is_small,
            measures_base=measures_base,
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


def expected_seconds(arguments: TuneArguments, checked: Checked, data: Prepared, model: Any, todo: ToDo) -> float:
    """Return about how many seconds are left of a run, in this process.

    Args:
        arguments: of the run.
        checked: what was found out about its base.
        data: what was found out about its data.
        model: the base.
        todo: what is left.
    """
    small = 1.0 - checked.shape.pruning_ratio
    tuned, base = small if todo.goes_small else 1.0, 1.0 if todo.measures_base else 0.0
    batches = sample_batches(arguments, data)
    lengths = [[length for _, length in batch] for batch in batches]
    real, padded = np.mean([(sum(of), num_padded(arguments, of)) for of in lengths], axis=0).tolist()
    speed = time_base(arguments, data, model, batches)
    passes = PASSES + (1 if arguments.sft.gradient_checkpointing else 0)
    taught = 1 if arguments.distill.distill else 0  # a forward pass of the teacher
    steps = passes * todo.soft_steps + (passes * tuned + taught) * todo.small_steps
    seconds = steps * arguments.sft.gradient_accumulation_steps * padded * speed.training
    reading = _of_this_process(arguments, data, todo.reading)
    num_read = reading.rotation + reading.refit + reading.layers * checked.shape.size("layers")
    filled = padded / real if arguments.pat.calibration is None else 1.0
    seconds += num_read * filled * speed.training + _choosing(checked, reading.refit, speed.reading)
    verified = sum(int(batch["input_ids"].numel()) for batch in data.verify_on)
    comparisons = (1 + small if todo.compacts else 0) + tuned + small
    seconds += COMPARING * comparisons * verified * speed.reading
    scored = sum(len(row["input_ids"]) for row in _scored(data))
    seconds += (base + tuned + small) * scored * speed.reading
    return float(seconds + (base + small) * NUM_PROMPTS * MAX_NEW_TOKENS * speed.writing)


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


def time_base(arguments: TuneArguments, data: Prepared, model: Any, batches: Sequence[Batch]) -> Speed:
    """Time the base on some of the batches, in the arithmetic of the training and in its own.

    Args:
        arguments: of the run.
        data: what was found out about its data.
        model: the base, whose vocabulary may still be another than the data's.
        batches: of which some are timed.
    """
    sft = arguments.sft
    ordered = sorted(batches, key=lambda batch: num_padded(arguments, [length for _, length in batch]))
    chosen = [[row for row, _ in ordered[int(place * len(ordered))]] for place in PLACES]
    # Which tokens they are makes no difference, and the base may lack some of those that the data were given.
    room = len(model.get_input_embeddings().weight) - 1
    with phase("Timing the base model"), evaluating(model), torch.no_grad():
        inputs = [_inputs(data.train.select(rows).to_list(), room, model.device) for rows in chosen]
        reading = training = seconds_per_token(model, inputs)
        if sft.fp16 or sft.bf16:
            with torch.autocast(model.device.type, torch.float16 if sft.fp16 else torch.bfloat16):
                training = seconds_per_token(model, inputs)
        writing = seconds_per_token(model, [{name: tensor[:1, :1] for name, tensor in inputs[0].items()}])
    return Speed(training, reading, writing)


def _inputs(rows: Sequence[Example], largest: int, device: torch.device) -> dict[str, torch.Tensor]:
    batch = next(iter(batches_from_examples(rows, batch_size=len(rows), pad_token_id=0)))
    ids, mask = batch["input_ids"].clamp_max(largest), batch["attention_mask"]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def seconds_per_token(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Return the seconds that a model takes to read a token, or its padding; no more batches than there is time for."""
    seconds, num_tokens = 0.0, 0
    begun = time.perf_counter()
    for inputs in batches:
        for _ in range(2):  # the first one allocates
            started = time.perf_counter()
            logits = model(**inputs, use_cache=False).logits
            float(logits[0, -1, 0])  # waits for the device
            taken = time.perf_counter() - started
            if taken > SECONDS_WITHOUT_WARMTH:
                break
        seconds, num_tokens = seconds + taken, num_tokens + inputs["input_ids"].numel()
        if time.perf_counter() - begun > SECONDS_TO_TIME:
            break
    return seconds / num_tokens


def tokens_there(arguments: TuneArguments, data: Prepared) -> float:
    """Return the number of tokens that channels can be chosen by: of a calibration file an estimate, or of the data."""
    if (path := arguments.pat.calibration) is not None:
        return os.path.getsize(path) // BYTES_PER_TOKEN
    return math.inf if data.stream is not None else data.num_tokens


def _of_this_process(arguments: TuneArguments, data: Prepared, asked: Reading) -> Reading:
    """Return what one process reads: each time the text begins anew, and has no more tokens than it has."""
    there = tokens_there(arguments, data)
    own = {name: int(min(num_tokens, there)) // ranks.num_processes() for name, num_tokens in asdict(asked).items()}
    return Reading(**own)


def _choosing(checked: Checked, num_read: int, per_token: float) -> float:
    """Return the seconds for the second moments of what goes into the writers, and for what is made of them.

    Args:
        checked: what was found out about the base.
        num_read: tokens that this process reads for it.
        per_token: seconds that the base takes for a token.
    """
    if not num_read:
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
    cost = cost_of(build_skeleton(checked.base_config, torch.bfloat16), usual_context(checked.base_config))
    return float(shape.size("layers") * flops * per_token / cost.prefill_flops_per_token)


def _scored(data: Prepared) -> Iterable[Example]:
    return [*data.held_out, *(() if data.general is None else data.general.windows)]
