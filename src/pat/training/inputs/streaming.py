"""What cannot be had of data that is read while training goes on."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig

from pat.data.load import parse_held_out
from pat.errors import PatError
from pat.training.options import DistillOptions, RunOptions


def check_streaming(run: RunOptions, sft: SFTConfig, distill: DistillOptions) -> None:
    """Check that nothing is asked for that takes all rows before the first step.

    Raises:
        PatError: it is; the message names the option.
    """
    if sft.max_steps < 1:
        raise PatError("Got streaming without max_steps; expected the number of steps, as rows are not counted before.")
    if len(run.dataset_names) > 1 and run.dataset_weights is None:
        raise PatError("Got streaming of several datasets without dataset_weights; expected a weight for each.")
    accelerates: Any = sft.accelerator_config
    dispatches = accelerates.dispatch_batches or accelerates.split_batches
    sampling = str(getattr(sft.train_sampling_strategy, "value", sft.train_sampling_strategy))
    refused = {
        "shuffle_dataset": (sft.shuffle_dataset, "the next example is drawn among those that wait"),
        "dataset_num_proc": (sft.dataset_num_proc, "tokens are made by the process that trains"),
        "packing": (sft.packing, "it takes all rows at once"),
        "vocabulary_size": (run.vocabulary_size, "the tokens that the data needs are not known before"),
        "distill_top_k": (distill.distill_top_k, "the teacher is asked about all rows at once"),
        "dataloader_num_workers": (sft.dataloader_num_workers, "rows are read by the process that trains"),
        "dataset_train_split": ("[" in run.dataset_train_split, "rows are not counted before; name a whole split"),
        "train_sampling_strategy": (
            sampling not in ("random", "sequential"),
            "lengths are not known before; expected 'random' or 'sequential'",
        ),
        "accelerator_config": (dispatches, "every process reads all rows, and trains on its own"),
        "held_out": (not _fits(run.held_out), "rows are not counted before; expected a number of rows, or a file"),
        "dataset_name": (
            any(name.startswith("task:") for name in run.dataset_names),
            "the questions of tasks are few, and read at once",
        ),
    }
    for name, (is_given, reason) in refused.items():
        if is_given:
            value = getattr(run, name, None) or getattr(sft, name, None) or getattr(distill, name, None)
            shown = "" if name == "accelerator_config" else f"={value}"
            raise PatError(f"Got {name}{shown} with streaming; {reason}.")


def _fits(held_out: Any) -> bool:
    """Tell whether it is a whole number, or a name."""
    amount = parse_held_out(held_out)
    return amount is None or isinstance(amount, str) or (isinstance(amount, int) and amount >= 0)
