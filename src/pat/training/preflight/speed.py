"""How fast the base is on this machine: it reads a few batches like those of the training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pat.nll import Example, batches_from_examples, evaluating
from pat.report.progress import phase
from pat.training.arguments import TuneArguments
from pat.training.inputs.prepare import Prepared, is_padding_free

NUM_SAMPLED = 64
"""Batches of the training whose lengths are looked at."""

PLACES = (0.5, 0.25, 0.75)
"""Places of the batches that are timed, as shares of their number by length. The middle one comes first: where a pass
takes long, it is the only one."""

SECONDS_TO_TIME = 3.0
"""No further batch is timed once so many seconds are gone."""

SECONDS_WITHOUT_WARMTH = 0.5
"""A pass that takes longer is not done again: what its allocations take no longer matters."""


@dataclass(frozen=True)
class Speed:
    """Seconds that the base takes on this machine."""

    training: float
    """Seconds to read a token, or its padding, in the arithmetic of the training."""
    reading: float
    """Seconds to read one in the base's own number format, in which models are scored and compared."""
    writing: float
    """Seconds to read a single token, which is about what it takes to write one."""


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
    if is_padding_free(sft):
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
