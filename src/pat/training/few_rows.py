"""Says before training that a run has too little to learn from: few rows, or the same ones many times."""

from __future__ import annotations

import logging

from pat.data.record import DataRecord
from pat.training.prepare import Prepared

logger = logging.getLogger(__name__)

FEW_EXAMPLES = 200
"""Number of examples below which a run is warned. No cut model has come back to its base with fewer here, and the part
of them that is held out tells two models apart only where they differ much."""

TOKENS_PER_SHARE = 30_000
"""Number of tokens to learn below which a run is warned, times the share of the parameters that is cut: 7,500 for a
quarter. This is a choice. Measured are two ends alone: an eighth of SmolLM2-135M is not told apart from its base after
some 2,700 tokens of answers (the demo), and a quarter was behind after 107,624 tokens of prompts and answers."""

MANY_EPOCHS = 10
"""Number of epochs from which on a model is expected to know its rows by heart."""


def warn_of_few_rows(data: Prepared, pruning_ratio: float, num_steps: int, rows_per_step: int | None) -> None:
    """Say so in one line if the data will not do for the cut.

    Args:
        data: of the run; of a stream it is not known how much there is.
        pruning_ratio: share of the parameters that is cut.
        num_steps: optimizer steps of the run.
        rows_per_step: rows that a step takes, over all processes.
    """
    if data.stream is not None or rows_per_step is None:
        return
    said = remark(data.record, num_steps * rows_per_step / len(data.train), pruning_ratio)
    if said is not None:
        logger.warning("%s", said)


def remark(record: DataRecord, num_epochs: float, pruning_ratio: float) -> str | None:
    """Return a warning with what there is, what to expect and what to do; None for enough data, or for a trial.

    Args:
        record: of the data.
        num_epochs: number of times that the run goes through them. Below 1 it does not take all rows, and whoever
            asks for so few steps knows that they are few.
        pruning_ratio: share of the parameters that is cut.
    """
    if round(num_epochs, 2) < 1:
        return None
    num_tokens = record.num_target_tokens - record.num_cut_target_tokens
    is_text = all(part.format == "text" for part in record.sources or (record,))
    times = "once" if round(num_epochs) == 1 else f"{num_epochs:,.0f} times"
    there = f"{record.num_examples:,} examples with {num_tokens:,} tokens to learn"
    remedy = "Train on more rows, mix others in (--dataset_name yours.jsonl general.jsonl --dataset_weights 7 3)"
    if num_tokens < TOKENS_PER_SHARE * pruning_ratio or (record.num_examples < FEW_EXAMPLES and not is_text):
        return (
            f"The run goes {times} through {there}, which are few for a cut of {100 * pruning_ratio:.1f} % of the "
            f"parameters: expect a model that answers worse than the base. {remedy}, or cut less."
        )
    if num_epochs >= MANY_EPOCHS:
        return (
            f"The run goes {times} through the same {there}: expect a model that knows them by heart, and a held-out "
            f"loss that rises while that of the training falls. {remedy}, or train for fewer steps."
        )
    return None
