"""The flags of `pat compare`, one for each field of `CompareConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from compare.config import CONFIGS, config_path
from compare.methods import METHODS
from pat.config_file import FLAG
from pat.errors import PatError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them; values are checked by `make_config`, which takes those of a file, too."""
    parser.add_argument("--models", nargs="+", help="Folders or hub ids of the base models.")
    parser.add_argument("--data", help="Instruction data: a file or hub id, as for `pat tune`.")
    parser.add_argument("--output_dir", help="New, empty, or that of the comparison to go on with.")
    parser.add_argument("--methods", nargs="+", help=f"Run at every ratio, of: {', '.join(METHODS)}.")
    parser.add_argument("--ablations", nargs="+", help="Methods that are run at --ablation_ratio alone.")
    parser.add_argument("--ratios", nargs="+", help="Shares of the hidden size to cut (default 0.2 0.25 0.3).")
    parser.add_argument("--ablation_ratio", help="Also where learning rates are searched (default 0.25).")
    parser.add_argument("--seeds", nargs="+", help="Runs of each method at each ratio (default 0 1 2).")
    parser.add_argument("--learning_rates", nargs="+", help="Searched for every method.")
    parser.add_argument("--search_steps", help="Steps of the runs of that search; by default --steps.")
    parser.add_argument("--rank", help="Of LoRA on the whole model; other methods train as many parameters.")
    parser.add_argument("--lora_alpha", help="Of every method.")
    parser.add_argument("--use_rslora", help="Of every method: true or false.")
    parser.add_argument("--lora_dropout", help="Of every method.")
    parser.add_argument("--mask_lr_multiplier", help="Of the paper's recipe: the mask's rate over the adapters'.")
    parser.add_argument("--steps", help="Optimizer steps of every method.")
    parser.add_argument("--epochs", help="Instead of steps.")
    parser.add_argument("--batch_size", help="Rows of a batch.")
    parser.add_argument("--gradient_accumulation_steps", help="Batches of a step.")
    parser.add_argument("--max_length", help="Tokens of a row at most.")
    parser.add_argument("--template", help="How instructions become prompts: alpaca (default), chat or auto.")
    parser.add_argument("--rows", help="Train on at most so many rows of the data.")
    parser.add_argument("--held_out", help="Rows to report on.")
    parser.add_argument("--validation", help="Rows to choose learning rates by.")
    parser.add_argument("--tasks", nargs="+", help="For accuracies: names, or 'paper' for its 14; 'none' for none.")
    parser.add_argument("--data_dir", help="Folder of the tasks' questions; by default they come from the hub.")
    parser.add_argument("--protocols", nargs="+", help="letter, likelihood, or both.")
    parser.add_argument("--limit", help="Questions of each task at most.")
    parser.add_argument("--eval_batch_size", help="Questions evaluated at once.")
    parser.add_argument("--calibration_rows", help="Sequences of --max_length tokens that the baselines prune by.")
    parser.add_argument("--workers", help="Cells to run at once.")
    parser.add_argument(
        "--threads", help="CPU threads of each worker; by default OMP_NUM_THREADS, or its share of the cores."
    )
    parser.add_argument("--baselines", help="Folder of the baselines, if pat is not run from its sources.")


def with_config_path(argv: Sequence[str]) -> list[str]:
    """Put the file of a ready-made comparison in the place of its name after `--config`.

    Raises:
        PatError: there is neither a ready-made comparison nor a file of that name.
    """
    result: list[str] = []
    for argument in argv:
        joined = argument.startswith(f"{FLAG}=")
        if joined or result[-1:] == [FLAG]:
            name = argument.removeprefix(f"{FLAG}=")
            path = config_path(name)
            if path is not None:
                argument = f"{FLAG}={path}" if joined else str(path)
            elif name and not Path(name).expanduser().is_file():
                names = ", ".join(CONFIGS)
                raise PatError(
                    f"Got {FLAG} {name}; expected a YAML file of flags, or a ready-made comparison: {names}."
                )
        result.append(argument)
    return result
