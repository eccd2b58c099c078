"""A line before training on how much the steps read, and a warning of too little: few rows, or the same many times."""

from __future__ import annotations

import logging
import math

from pat.data.record import DataRecord
from pat.training.inputs.prepare import Prepared

logger = logging.getLogger(__name__)

FEW_EXAMPLES = 200
"""Number of examples below which a run is warned. No cut model has come back to its base with fewer here, and the part
of them that is held out tells two models apart only where they differ much."""

TOKENS_PER_SHARE = 500_000
"""Number of tokens to learn below which a run is warned, times the share of the parameters that is cut: 125,000 for a
quarter. It is a choice: all runs on SmolLM2-135M with fewer ended behind the base, the demo excepted, and with more it
has not been tried. See `MEASURED`."""

MEASURED = (
    "SmolLM2-135M-Instruct ended 0.16 nats per token behind with 13.6 % cut and 32,000 such tokens, and 0.38 with 25 % "
    "and some 106,000"
)
"""Two runs that a new one may be compared with: a user's, and the one of 304,237 tokens, prompts included, in
`docs/experiments.md`."""

MANY_EPOCHS = 10
"""Number of epochs from which on a model is expected to know its rows by heart."""

TRIAL_STEPS = 10
"""Number of steps up to which a run is taken for a trial: whoever asks for so few knows that they are few."""


def rows_read(data: Prepared, num_steps: int, rows_per_step: int | None) -> str:
    """Say how much of the data the steps of a run read.

    Args:
        data: of the run; of a stream it is not known how much there is.
        num_steps: optimizer steps of the run.
        rows_per_step: rows that a step takes, over all processes; None if that is not known.
    """
    steps = f"{num_steps:,} step{'' if num_steps == 1 else 's'}"
    if rows_per_step is None:
        return steps
    if data.stream is not None:
        return f"{steps} of {rows_per_step:,} examples"
    num_rows, one = len(data.train), num_steps == 1
    unit = "examples" if num_rows == _num_trained(data.record) else "rows of an epoch"
    epochs = _num_epochs(num_rows, num_steps, rows_per_step)
    if round(epochs, 2) < 1:
        share = f"{epochs:.2g} epochs" if epochs >= 0.01 else "less than 0.01 epochs"
        num_read = f"{num_steps * rows_per_step:,}"
        return f"{steps} of {rows_per_step:,} read{'s' * one} {num_read} of the {num_rows:,} {unit} ({share})"
    times = "once" if round(epochs, 1) == 1 else f"{round(epochs, 1):g} times"
    return f"{steps} of {rows_per_step:,} go{'es' * one} {times} through the {num_rows:,} {unit}"


def _num_trained(record: DataRecord) -> int:
    """Return the number of examples that are trained on, where each of them is a row."""
    return record.num_examples - record.num_left_out


def _num_epochs(num_rows: int, num_steps: int, rows_per_step: int) -> float:
    """Return how many times a run goes through its rows; the last step of each epoch takes those that are left."""
    if num_steps * rows_per_step < num_rows:
        return num_steps * rows_per_step / num_rows
    return num_steps / math.ceil(num_rows / rows_per_step)


def warn_of_few_rows(data: Prepared, pruning_ratio: float, num_steps: int, rows_per_step: int | None) -> None:
    """Say so in one line if the data, or what the steps read of them, will not do for the cut.

    Args:
        data: of the run; of a stream it is not known how much there is.
        pruning_ratio: share of the parameters that is cut.
        num_steps: optimizer steps of the run.
        rows_per_step: rows that a step takes, over all processes.
    """
    if data.stream is not None or rows_per_step is None:
        return
    num_epochs = _num_epochs(len(data.train), num_steps, rows_per_step)
    said = remark(data.record, num_epochs, pruning_ratio, num_steps)
    if said is not None:
        logger.warning("%s", said)


def remark(record: DataRecord, num_epochs: float, pruning_ratio: float, num_steps: int) -> str | None:
    """Return a warning with what there is, what to expect and what to do; None for enough data, or for a trial.

    Args:
        record: of the data.
        num_epochs: number of times that the run goes through them; below 1 it does not take all rows.
        pruning_ratio: share of the parameters that is cut.
        num_steps: optimizer steps of the run.
    """
    num_examples, num_tokens = _num_trained(record), record.num_target_tokens - record.num_cut_target_tokens
    num_wanted = TOKENS_PER_SHARE * pruning_ratio
    is_text = all(part.format == "text" for part in record.sources or (record,))

    def missing(share: float) -> list[str]:
        examples = [f"{FEW_EXAMPLES:,} examples"] * (share * num_examples < FEW_EXAMPLES and not is_text)
        return examples + [f"{num_wanted:,.0f} tokens to learn"] * (share * num_tokens < num_wanted)

    few = f"few for a cut of {100 * pruning_ratio:.1f} % of the parameters"
    expect = (
        "expect a model that answers worse than the base, unless that does not know the task of the data at all "
        f"({MEASURED})"
    )
    wanted = f"{' and '.join(missing(1.0))} or more"
    mix = "mix others in (--dataset_name yours.jsonl general.jsonl --dataset_weights 7 3)"
    if round(num_epochs, 2) < 1:
        if num_steps <= TRIAL_STEPS or not missing(num_epochs):
            return None
        remedy = f"Take more steps ({math.ceil(num_steps / num_epochs):,} read all examples once)"
        return (
            f"The steps read {100 * num_epochs:.2g} % of the data, with some {num_epochs * num_tokens:,.0f} tokens to "
            f"learn, which are {few}: {expect}. "
            f"{remedy}{f' and more rows ({wanted}), or {mix}' if missing(1.0) else ''}, or cut less."
        )
    times = "once" if round(num_epochs) == 1 else f"{num_epochs:,.0f} times"
    there = f"{num_examples:,} examples with {num_tokens:,} tokens to learn"
    remedy = "Train on more rows"
    if missing(1.0):
        return (
            f"The run goes {times} through {there}, which are {few}: {expect}. {remedy} ({wanted}), {mix}, or cut less."
        )
    if num_epochs >= MANY_EPOCHS:
        return (
            f"The run goes {times} through the same {there}: expect a model that knows them by heart, and a held-out "
            f"loss that rises while that of the training falls. {remedy}, {mix}, or train for fewer steps."
        )
    return None
