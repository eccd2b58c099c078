"""The arguments of `pat tune` that a cell is trained with, whatever method it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compare.cells import Cell
from compare.config import CompareConfig
from compare.methods import METHODS
from pat.training.arguments import TuneArguments, build_arguments


def cell_arguments(config: CompareConfig, cell: Cell, *, source: str, train: Path, folder: Path) -> TuneArguments:
    """Return the arguments of a cell.

    Args:
        config: of the comparison.
        cell: what is run.
        source: the base model.
        train: rows to train on.
        folder: of the run.
    """
    method = METHODS[cell.method]
    steps = config.search_steps if cell.search and config.search_steps is not None else config.steps
    flags: dict[str, Any] = {
        "recipe": "default",
        "model_name_or_path": source,
        "dataset_name": str(train),
        "held_out": "0",
        "general_text": "none",
        "output_dir": str(folder),
        "seed": cell.seed,
        "learning_rate": cell.learning_rate if method.trains else 1e-4,  # trainers refuse 0
        "lora_r": config.rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_length": config.max_length,
        "max_steps": -1 if steps is None else steps,
        "num_train_epochs": 1 if config.epochs is None else config.epochs,
        # By default float32 on every CPU: whether bf16 pays there is measured, which may come out otherwise next time.
        "bf16": torch.accelerator.is_available() if config.bf16 is None else config.bf16,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "include_num_input_tokens_seen": "non_padding",
    }
    if method.order == "PAT":
        flags |= {"pruning_ratio": cell.ratio, **method.flags}
        if method.of_paper:
            flags["mask_lr_multiplier"] = config.mask_lr_multiplier
    else:
        flags |= {name: value for name, value in method.flags.items() if name == "use_dora"}
    return build_arguments(**flags)
