"""About how long a run takes: what its base takes on this machine for a few batches, times what there is to do."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from pat import ranks
from pat.loading import empty_model
from pat.nll import Example
from pat.surgery.costs import build_skeleton, cost_of, usual_context
from pat.surgery.describe import head_dim
from pat.training.arguments import TuneArguments
from pat.training.inputs.prepare import Prepared
from pat.training.outcome.samples import MAX_NEW_TOKENS, NUM_PROMPTS
from pat.training.preflight.check import Checked
from pat.training.preflight.speed import num_padded, sample_batches, time_base
from pat.training.run.checkpoints import is_compact
from pat.training.run.folder import Start

PASSES, PASSES_UNDER_AUTOCAST = 3.7, 4.3
"""A training step takes about as long as this many forward passes over its tokens, in float32 and under autocast, which
makes the forward pass faster than the rest: one there, one back through the frozen weights, and what the adapter, the
loss over the whole vocabulary and the optimizer take. Measured on SmolLM2-135M, in processor time of one thread."""

WITH_ADAPTER = 1.15
"""How much longer a model reads with its adapter beside its weights."""

BYTES_PER_TOKEN = 4
"""Bytes of a text to calibrate on for each of its tokens, about."""

ORDERING_FLOPS = 15.0
"""Operations of float32 that take as long as ordering and refitting the n channels before a writer in float64, as a
multiple of n^3: an inverse takes 2 n^3, the rounds of elimination and the refit half as much, and float64 at least
twice as long. Measured on a CPU with 1,536 channels."""

COMPARING = 2.0
"""How much longer two models are compared than they read: over the whole vocabulary, beside folding, writing and
loading."""

RANGE = (0.75, 1.5)
"""A run may take from and to so many times what was reckoned: the machine does other things meanwhile, and the share of
a step that is not the forward pass differs between machines."""


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
    done_share: float = 0.0
    """Share of all steps that are done."""

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
            done_share=done / num_steps if num_steps else 0.0,
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


@dataclass(frozen=True)
class Expected:
    """About how long a run takes."""

    seconds: float
    """Seconds of all that is left of it."""
    step_seconds: float
    """Seconds of a step, the mean of those that are left; 0 if none is."""
    rest: float
    """Seconds of what does not depend on the number of steps: choosing, cutting, scoring, comparing, writing."""


def expect(arguments: TuneArguments, checked: Checked, data: Prepared, model: Any, todo: ToDo) -> Expected:
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
    sft, num_steps = arguments.sft, todo.soft_steps + todo.small_steps
    batches = sample_batches(arguments, data)
    lengths = [[length for _, length in batch] for batch in batches]
    real, padded = np.mean([(sum(of), num_padded(arguments, of)) for of in lengths], axis=0).tolist()
    speed = time_base(arguments, data, model, batches)
    passes = (PASSES_UNDER_AUTOCAST if sft.bf16 or sft.fp16 else PASSES) + (1 if sft.gradient_checkpointing else 0)
    taught = 1 if arguments.distill.distill else 0  # a forward pass of the teacher
    steps = passes * todo.soft_steps + (passes * tuned + taught) * todo.small_steps
    stepping = seconds = steps * sft.gradient_accumulation_steps * padded * speed.training
    if data.evaluation is not None:
        share = todo.small_steps / num_steps if num_steps else 0.0
        rows = sum(len(row["input_ids"]) for row in data.evaluation)
        width = (1 - share + share * tuned) * WITH_ADAPTER
        seconds += _num_evaluations(sft, data, num_steps, todo.done_share) * width * rows * speed.training
    reading = _of_this_process(arguments, data, todo.reading)
    num_read = reading.rotation + reading.refit + reading.layers * checked.shape.size("layers")
    filled = padded / real if arguments.pat.calibration is None else 1.0
    seconds += num_read * filled * speed.training + _choosing(checked, reading.refit, speed.reading)
    verified = sum(int(batch["input_ids"].numel()) for batch in data.verify_on)
    tuned *= WITH_ADAPTER
    comparisons = (1 + small if todo.compacts else 0) + tuned + small
    seconds += COMPARING * comparisons * verified * speed.reading
    scored = sum(len(row["input_ids"]) for row in _scored(data))
    seconds += (base + tuned + small) * scored * speed.reading
    seconds += (base + small) * NUM_PROMPTS * MAX_NEW_TOKENS * speed.writing
    return Expected(float(seconds), float(stepping / num_steps) if num_steps else 0.0, float(seconds - stepping))


def span(seconds: float) -> str:
    """Return a duration that is reckoned, in words: from what to what it may be."""
    low, high = (factor * seconds for factor in RANGE)
    if high < 60:
        return "less than a minute"
    return _from_to(low, high, *((3600.0, "hours") if low >= 1.5 * 3600 else (60.0, "minutes")))


def step_span(seconds: float) -> str:
    """Return the duration of a step in the same way."""
    low, high = (factor * seconds for factor in RANGE)
    if high < 1:
        return "less than a second a step"
    return f"{_from_to(low, high, *((60.0, 'minutes') if low >= 90 else (1.0, 'seconds')))} a step"


def _from_to(low: float, high: float, size: float, unit: str) -> str:
    first, last = max(1, round(low / size)), max(2, round(high / size))
    return f"{first:,} to {last:,} {unit}"


def _num_evaluations(sft: SFTConfig, data: Prepared, num_steps: int, share_done: float) -> float:
    """Return about how often the trainer scores held-out rows in the steps that are left.

    Args:
        sft: arguments of the trainer.
        data: what was found out about its data.
        num_steps: steps that are left.
        share_done: share of all steps that are done.
    """
    if not num_steps:
        return 0.0
    if sft.eval_strategy == IntervalStrategy.EPOCH:
        rows = num_steps * sft.per_device_train_batch_size * sft.gradient_accumulation_steps * ranks.num_processes()
        return rows / len(data.train)
    every = sft.eval_steps or sft.logging_steps
    return num_steps / every if every >= 1 else (1 - share_done) / every


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
