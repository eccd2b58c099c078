"""What `pat tune` can be told: options of ours, of the method, and of TRL, with a recipe of defaults under them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from trl import ModelConfig, SFTConfig

from pat.errors import PatError
from pat.options import OptionsParser
from pat.recipes import recipe_defaults
from pat.training.options import RunOptions
from pat.tuner.config import PatConfig
from pat.tuner.options import PatOptions

_LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Fields of `LoraConfig`, and what TRL's ModelConfig calls them."""


@dataclass(frozen=True)
class TuneArguments:
    """Everything that `pat tune` is told, the defaults filled in."""

    run: RunOptions = field(metadata={"section": "data and run"})
    pat: PatOptions = field(metadata={"section": "pruning"})
    model: ModelConfig = field(metadata={"section": "model and adapter (TRL's ModelConfig)"})
    sft: SFTConfig = field(metadata={"section": "training (TRL's SFTConfig, transformers' TrainingArguments)"})

    USAGE: ClassVar = (
        "pat tune --model_name_or_path M --dataset_name D --output_dir OUT [--pruning_ratio R] [--flag value ...]"
    )
    DESCRIPTION: ClassVar = """\
Fine-tune a language model and get it back smaller: M (folder or hub id) is tuned on D (hub id, .json, .jsonl, .parquet
or .csv), loses the share R of its hidden size, and is written to OUT/model as a standard checkpoint that loads without
pat. OUT/results.json holds the figures, OUT/adapter the adapter as of the milestone, where the model shrinks, and
OUT/compact the small base and its LoRA adapter from there on.

examples:
  pat tune --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name data.jsonl --pruning_ratio 0.25 \\
      --output_dir small
  pat tune --config run.yaml --output_dir small       # run.yaml: lines such as `learning_rate: 2e-4`; flags win

Every flag of transformers' TrainingArguments and TRL's SFTConfig and ModelConfig works, with - for _ too. The defaults
shown are the recipe's (--recipe) and the libraries'. --config FILE takes flags from a file, --debug shows tracebacks.\
"""
    MAIN_FLAGS: ClassVar = (
        "model_name_or_path",
        "dataset_name",
        "output_dir",
        "pruning_ratio",
        "recipe",
        "template",
        "max_length",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lora_r",
        "seed",
    )
    """Flags that most runs set."""

    @staticmethod
    def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what lies between TRL's defaults and what is given: LoRA's, the machine's, the recipe's."""
        lora = {flag: PatConfig.__dataclass_fields__[name].default for name, flag in _LORA.items()}
        return {**lora, **_machine_defaults(), **recipe_defaults(given.get("recipe", RunOptions.recipe))}

    def __post_init__(self) -> None:
        if self.sft.eval_strategy != "no" and self.run.held_out in ("0", 0):
            raise PatError(
                f"Got eval_strategy={str(self.sft.eval_strategy)!r} with held_out=0; expected rows to evaluate on: "
                "leave --held_out at its default, or set --eval_strategy no."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise PatError(
                f"Got {os.environ['WORLD_SIZE']} processes; `pat tune` runs in one. Train with PatCallback in a script "
                "of your own, and merge with `pat merge`."
            )
        # The trainer writes its checkpoints below the run's folder, whose other names are the product's.
        self.sft.output_dir = str(self.output_dir / "checkpoints")

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.output_dir)

    def pat_config(self) -> PatConfig:
        """Return the adapter's configuration."""
        lora = {name: getattr(self.model, flag) for name, flag in _LORA.items()}
        return PatConfig(
            task_type="CAUSAL_LM", **lora, **{f.name: getattr(self.pat, f.name) for f in fields(PatOptions)}
        )


def build_arguments(**flags: Any) -> TuneArguments:
    """Build arguments from keywords named like the flags of `pat tune`, over a recipe's defaults.

    Raises:
        PatError: an unknown keyword, a value that does not fit, or an unknown recipe.
    """
    return OptionsParser("pat tune", TuneArguments).build(flags)


def _machine_defaults() -> dict[str, Any]:
    """Return what differs from TRL's defaults by machine.

    With an accelerator the base is loaded in its checkpoint's dtype (TRL would load float32, twice the memory).
    Without one, TRL's bf16 autocast is refused and its recomputing of activations only costs time, and arithmetic in
    bf16 is many times slower on most CPUs than in float32.
    """
    if torch.accelerator.is_available():
        return {"dtype": "auto"}
    return {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dtype": "float32"}
