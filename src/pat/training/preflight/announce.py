"""What a run says before it trains: what was understood, its stages, and about what time and memory they take."""

from __future__ import annotations

import sys
from typing import Any

from pat import ranks
from pat.loading import empty_model
from pat.method.schedule import milestone_step
from pat.report import numbers
from pat.shape import AXES, Shape, missed_ratio
from pat.surgery.costs import build_skeleton
from pat.surgery.describe import head_dim
from pat.training.arguments import TuneArguments
from pat.training.distillation.teacher import announce_teacher
from pat.training.engines.engine import describe, quantises, shards
from pat.training.inputs.prepare import Prepared
from pat.training.preflight.check import Checked, compacts
from pat.training.preflight.estimate import Reading, ToDo, expect, span, step_span, steps_done, tokens_there
from pat.training.preflight.few_rows import rows_read, warn_of_few_rows
from pat.training.preflight.threads import Threads
from pat.training.run.folder import Start
from pat.tuner.calibration import DEFAULT_TOKENS_PER_CHANNEL
from pat.tuner.depth import LAYER_TOKENS
from pat.tuner.experts import tokens_per_routed
from pat.tuner.memory import training_memory
from pat.tuner.refit import TOKENS_PER_CHANNEL


def announce(
    arguments: TuneArguments,
    checked: Checked,
    data: Prepared,
    model: Any,
    num_steps: int,
    *,
    start: Start,
    measures_base: bool,
    threads: Threads | None = None,
    rows_per_step: int | None = None,
) -> float:
    """Say in four lines on stderr what was understood, and what it will take; warn of data that will not do for it.

    Args:
        arguments: of the run.
        checked: what was found out about its base.
        data: what was found out about its data.
        model: the base.
        num_steps: optimizer steps of both stages.
        start: where the run begins; what is done by then is not counted among what is expected.
        measures_base: whether the base is still to be scored.
        threads: the number of them, where it was chosen.
        rows_per_step: rows that a step takes, over all processes.

    Returns:
        About how many seconds a step takes; 0 where that is not known.
    """
    shape = checked.shape
    milestone = arguments.pat.milestone_share(cuts_hidden=shape.cuts("hidden"))
    soft = min(num_steps, milestone_step(milestone, num_steps))
    goes_small = compacts(arguments.run.no_compact, arguments.pat_config())
    said, reading = _reading(arguments, checked, tokens_there(arguments, data))
    sft = arguments.sft
    dtype = str(model.dtype).removeprefix("torch.")
    kind = numbers.arithmetic(dtype, bf16=bool(sft.bf16), fp16=bool(sft.fp16))
    taught = announce_teacher(arguments, data, model, soft, num_steps)
    kept = data.vocabulary.kept
    trimmed = "" if kept is None else f"vocabulary {data.vocabulary.num_untrimmed:,} to {len(kept):,} tokens, "
    worded = ""
    if data.record.is_alpaca and data.vocabulary.writes_alpaca:
        worded = " The chat template that is written asks in these words."
    costs, step_seconds = [], 0.0
    if ranks.is_first() and not shards(arguments.sft):
        todo = ToDo.of(start, soft, num_steps, reading, goes_small=goes_small, measures_base=measures_base)
        found = expect(arguments, checked, data, model, todo)
        step_seconds = found.step_seconds
        parts = f" ({step_span(step_seconds)}, and {span(found.rest)} beside the steps)" if step_seconds else ""
        costs.append(span(found.seconds) + parts)
    if not quantises(arguments, checked.base_config) and not shards(arguments.sft):
        num_bytes = _memory(arguments, checked, data, model)
        size = f"{num_bytes / 1e9:,.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:,.0f} MB"
        # Without a soft mask only the calibration runs at the base's width.
        most = "at most " if goes_small and not soft else ""
        costs.append(f"{most}{size} for weights and activations")
    begins = start.checkpoint is None and not start.is_trained
    after = steps_done(start) or num_steps
    done = "" if begins else f" for what is left after {after:,} step{'' if after == 1 else 's'}"
    with_threads = "" if threads is None else f" with {threads.describe()}"
    expected = f"\nExpected{done}: {' and '.join(costs)}." if costs else ""
    print(
        f"{data.record.describe()}{worded}\n"
        f"Model: {checked.family.model_type}, {trimmed}{shape.describe()}{_away(arguments, shape)}, "
        f"{kind} on {describe(str(model.device))}{with_threads}.{said if begins else ''}{taught}\n"
        f"Steps: {rows_read(data, num_steps, rows_per_step)}, {_stages(soft, num_steps, goes_small)}.{expected}",
        file=sys.stderr,
    )
    warn_of_few_rows(data, shape.pruning_ratio, num_steps, rows_per_step)
    return step_seconds


def _stages(soft: int, num_steps: int, goes_small: bool) -> str:
    """Say which of the steps are taken with a soft mask, and what the others train."""
    rest = "on the small model" if goes_small else "at full width"
    if not soft:
        return f"all {rest}" if num_steps > 1 else rest
    return f"{soft:,} with a soft mask and {num_steps - soft:,} {rest}"


def _away(arguments: TuneArguments, shape: Shape) -> str:
    """Say how much is cut where that is not about the ratio that was asked for."""
    if missed_ratio(vars(arguments.pat_config()), shape.pruning_ratio) is None:
        return ""
    return f" ({shape.pruning_ratio:.1%} of the parameters: {shape.reason})"


def _reading(arguments: TuneArguments, checked: Checked, num_there: float) -> tuple[str, Reading]:
    """Return what is read before training, in words and in tokens, where `num_there` tokens can be read."""
    shape, config, text, rotation, refit, layers = checked.shape, checked.base_config, "", 0, 0, 0
    if shape.cuts("hidden"):
        rotation = arguments.pat.calibration_tokens or DEFAULT_TOKENS_PER_CHANNEL * shape.size("hidden")
    widths = {"mlp": shape.size("mlp")}
    widths["heads"] = head_dim(empty_model(config)) * config.num_attention_heads
    if cut := [name for name in widths if shape.cuts(name)]:
        widths["mlp"] *= tokens_per_routed(config)
        refit = arguments.pat.refit_tokens or TOKENS_PER_CHANNEL * max(widths[name] for name in cut)
        what = " and ".join(AXES[name].label for name in cut)
        if refit < num_there:
            read = f"{refit:,} tokens, and the rest of their batch, are read first"
            text = f" {read}, to choose the {what} (--refit_tokens)."
        else:
            text = f" {_all(num_there, arguments)} are read first, to choose the {what}."
    if shape.cuts("layers"):
        there = f"{LAYER_TOKENS:,} tokens" if num_there > LAYER_TOKENS else _all(num_there, arguments)
        text += f" {there} are read {shape.size('layers')} times, to choose the layers."
        layers = LAYER_TOKENS
    return text, Reading(rotation, refit, layers)


def _all(num_there: float, arguments: TuneArguments) -> str:
    """Name all tokens that can be read; the number of those in a file is an estimate."""
    file = arguments.pat.calibration
    return (
        f"All {num_there:,.0f} tokens of the data" if file is None else f"All of {file}, about {num_there:,.0f} tokens,"
    )


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
