"""What a run says before it trains: what was understood, its stages, and about what time and memory they take."""

from __future__ import annotations

import sys
import time
from typing import Any, cast

import torch

from pat import ranks
from pat.loading import empty_model
from pat.method.schedule import milestone_step
from pat.nll import batches_from_examples, evaluating
from pat.report.progress import phase
from pat.shape import AXES
from pat.surgery.costs import build_skeleton
from pat.surgery.describe import head_dim
from pat.training.arguments import TuneArguments
from pat.training.check import Checked, compacts
from pat.training.engine import describe, quantises, shards
from pat.training.prepare import Prepared
from pat.training.teacher import announce_teacher
from pat.tuner.depth import LAYER_TOKENS
from pat.tuner.experts import tokens_per_routed
from pat.tuner.memory import training_memory
from pat.tuner.refit import TOKENS_PER_CHANNEL

PASSES = 3.0
"""A training step takes about as long as this many forward passes over its tokens: one there, one back through the
frozen weights, and as much again for the adapter and the optimizer."""


def announce(
    arguments: TuneArguments, checked: Checked, data: Prepared, model: Any, num_steps: int, *, is_new: bool = True
) -> None:
    """Say in one line on stderr what was understood, and what it will take.

    Args:
        arguments: of the run.
        checked: what was found out about its base.
        data: what was found out about its data.
        model: the base.
        num_steps: optimizer steps of both stages.
        is_new: nothing is trained yet; else the time that is left is not that of all steps, and is not said.
    """
    shape = checked.shape
    milestone = arguments.pat.milestone_share(cuts_hidden=shape.cuts("hidden"))
    soft = min(num_steps, milestone_step(milestone, num_steps))
    goes_small = compacts(arguments.run.no_compact, arguments.pat_config())
    rest = "on the small model" if goes_small else "at full width"
    reading, num_read = _reading(arguments, checked)
    autocast = " under bf16 autocast" if arguments.sft.bf16 and model.dtype == torch.float32 else ""
    taught = announce_teacher(arguments, data, model, soft, num_steps)
    kept = data.vocabulary.kept
    trimmed = "" if kept is None else f"vocabulary {data.vocabulary.num_untrimmed:,} to {len(kept):,} tokens, "
    worded = ""
    if data.record.is_alpaca and data.vocabulary.writes_alpaca:
        worded = " The chat template that is written asks in these words."
    costs = []
    if is_new and ranks.is_first() and not shards(arguments.sft):
        small = 1.0 - shape.pruning_ratio if goes_small else 1.0
        passes = PASSES + 1 if arguments.sft.gradient_checkpointing else PASSES
        trained = num_tokens_of_step(arguments, data) * (soft + (num_steps - soft) * small)
        examples = [*data.held_out, *(() if data.general is None else data.general.windows)]
        scored = 2 * sum(len(example["input_ids"]) for example in examples)  # by the tuned model and the written one
        costs.append(about((num_read + passes * trained + scored) * _seconds_per_token(arguments, data, model)))
    if not quantises(arguments, checked.base_config) and not shards(arguments.sft):
        num_bytes = _memory(arguments, checked, data, model)
        size = f"{num_bytes / 1e9:,.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:,.0f} MB"
        # Without a soft mask only the calibration runs at the base's width.
        most = "at most " if goes_small and not soft else ""
        costs.append(f"{most}{size} for weights and activations")
    expected = f" Expected: {' and '.join(costs)}." if costs else ""
    print(
        f"{data.record.describe()}{worded} Model: {checked.family.model_type}, {trimmed}{shape.describe()}, "
        f"{str(model.dtype).removeprefix('torch.')}{autocast} on {describe(str(model.device))}; {num_steps:,} steps, "
        f"{soft:,} with a soft mask and {num_steps - soft:,} {rest}.{reading}{taught}{expected}",
        file=sys.stderr,
    )


def num_tokens_of_step(arguments: TuneArguments, data: Prepared) -> float:
    """Return the mean number of tokens, without padding, of an optimizer step of this process."""
    rows = arguments.sft.per_device_train_batch_size * arguments.sft.gradient_accumulation_steps
    return rows * data.num_tokens / max(1, len(data.train))


def about(seconds: float) -> str:
    """Return a duration that is not known well, in words."""
    for size, unit in ((3600.0, "hour"), (60.0, "minute")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}s"
    return "a minute or two" if seconds > 30 else "less than a minute"


def _reading(arguments: TuneArguments, checked: Checked) -> tuple[str, int]:
    """Return what is read before training, in words, and in tokens that are read once."""
    shape, config, text, num_read = checked.shape, checked.base_config, "", 0
    widths = {"mlp": shape.size("mlp")}
    widths["heads"] = head_dim(empty_model(config)) * config.num_attention_heads
    if read := [name for name in widths if shape.cuts(name)]:
        widths["mlp"] *= tokens_per_routed(config)
        num_read = arguments.pat.refit_tokens or TOKENS_PER_CHANNEL * max(widths[name] for name in read)
        what = " and ".join(AXES[name].label for name in read)
        text = f" Up to {num_read:,} tokens are read first, to choose the {what} (--refit_tokens)."
    if shape.cuts("layers"):
        text += f" {LAYER_TOKENS:,} tokens are read {shape.size('layers')} times, to choose the layers."
        num_read += LAYER_TOKENS * shape.size("layers")
    return text, num_read // ranks.num_processes()


@torch.no_grad()
def _seconds_per_token(arguments: TuneArguments, data: Prepared, model: Any) -> float:
    """Return the time that the base takes to read a token, in a batch of the training and its arithmetic."""
    sft, device = arguments.sft, model.device
    rows = [data.train[index] for index in range(min(sft.per_device_train_batch_size, len(data.train)))]
    padding = cast(int, data.vocabulary.tokenizer.pad_token_id)
    batch = next(iter(batches_from_examples(rows, batch_size=len(rows), pad_token_id=padding)))
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    dtype = torch.float16 if sft.fp16 else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=bool(sft.fp16 or sft.bf16))
    with phase("Timing the base model"), evaluating(model), autocast:
        for _ in range(2):  # the first one allocates
            started = time.perf_counter()
            logits = model(**inputs, use_cache=False).logits
            float(logits[0, -1, 0])  # waits for the device
            seconds = time.perf_counter() - started
    return seconds / sum(len(row["input_ids"]) for row in rows)


def _memory(arguments: TuneArguments, checked: Checked, data: Prepared, model: Any) -> int:
    """Return the bytes that training takes beside what the process needs for itself, see `training_memory`."""
    sft = arguments.sft
    found = training_memory(
        build_skeleton(data.vocabulary.config_of(checked.base_config), model.dtype),
        arguments.pat_config(),
        batch_size=sft.per_device_train_batch_size,
        length=data.longest,
    )
    return found.checkpointed_total_bytes if sft.gradient_checkpointing else found.total_bytes
