"""Options of `pat tune`: ours, the method's and TRL's, over a recipe of defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from trl import ModelConfig, SFTConfig

from pat.checkpoint.places import CHECKPOINTS, RUN_FILE
from pat.errors import PatError
from pat.loading import load_config
from pat.options import OptionsParser
from pat.paths import check_writable, expand
from pat.recipes import recipe_defaults
from pat.report.progress import phase
from pat.shape import check_request
from pat.training.engines.accelerated import check_installed
from pat.training.inputs.streaming import check_streaming
from pat.training.options import MAIN_FLAGS, DistillOptions, RunOptions
from pat.training.preflight.precision import bf16_pays_on_cpu
from pat.training.refused import REFUSED
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


_NAME = re.compile(r"[\w.]+")
"""Pattern of a module's name, or the end of one; anything else is taken for a regular expression."""

_MAPPINGS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
"""Flags for which transformers takes any text, even where it cannot use it."""

RANGES: dict[str, str] = {
    "per_device_train_batch_size": "[1, 1048576]",
    "per_device_eval_batch_size": "[1, 1048576]",
    "gradient_accumulation_steps": "[1, 1048576]",
    "num_train_epochs": "(0, 1000000]",
    "max_steps": "-1 | [1, inf)",
    "learning_rate": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "max_grad_norm": "[0, inf)",
    "label_smoothing_factor": "[0, 1)",
    "neftune_noise_alpha": "[0, inf)",
    "torch_empty_cache_steps": "[1, inf)",
    "logging_steps": "(0, inf)",
    "eval_steps": "(0, inf)",
    "eval_delay": "[0, inf)",
    "eval_accumulation_steps": "[1, inf)",
    "save_steps": "(0, inf)",
    "save_total_limit": "[1, inf)",
    "seed": "[0, 4294967295]",
    "data_seed": "[0, 4294967295]",
    "dataloader_num_workers": "[0, 1024]",
    "dataloader_prefetch_factor": "[1, 1048576]",
    "ddp_bucket_cap_mb": "[1, 1048576]",
    "ddp_timeout": "[1, 2147483647]",
    "router_aux_loss_coef": "[0, inf)",
    "dataset_num_proc": "[1, 1024]",
    "max_length": "[1, 2147483647]",
    "pad_to_multiple_of": "[1, 65536]",
    "lora_r": "[1, 65536]",
    "lora_alpha": "[1, inf)",
    "lora_dropout": "[0, 1)",
}
"""Ranges of the libraries' numbers (see `pat.ranges`): of most of them they take any, without a word or a step."""


class OneDevice(SFTConfig):
    """Arguments of a trainer that takes one of several GPUs, instead of `nn.DataParallel` on all of them."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs, at most one."""
        return min(int(super().n_gpu), 1)


@dataclass(frozen=True)
class TuneArguments:
    """Everything that `pat tune` is told, the defaults filled in."""

    run: RunOptions = field(metadata={"section": "data and run"})
    pat: PatOptions = field(metadata={"section": "pruning"})
    distill: DistillOptions = field(metadata={"section": "teacher"})
    model: ModelConfig = field(metadata={"section": "model and adapter (TRL's ModelConfig)"})
    sft: OneDevice = field(metadata={"section": "training (TRL's SFTConfig, transformers' TrainingArguments)"})
    given: frozenset[str] = frozenset()
    """Names of the options that a flag, a file or a keyword has set, even if to the default."""

    USAGE: ClassVar = (
        "pat tune --model_name_or_path M --dataset_name D --output_dir OUT [--pruning_ratio R] [--flag value ...]"
    )
    DESCRIPTION: ClassVar = """\
Fine-tune a language model and get it back smaller: M (folder or hub id) is tuned on D (hub id, .json, .jsonl, .parquet
or .csv), loses the share R of its parameters, and is written to OUT/model as a standard checkpoint that loads without
pat. OUT/results.json holds the figures, OUT/adapter the adapter as of the milestone, where the model shrinks, and
OUT/compact the small base and its LoRA adapter from there on.

examples:
  pat tune --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name data.jsonl --pruning_ratio 0.25 \\
      --output_dir small
  pat tune --config run.yaml --output_dir small       # run.yaml: lines such as `learning_rate: 2e-4`; flags win

Every flag of transformers' TrainingArguments and TRL's SFTConfig and ModelConfig works, or is refused with the reason;
- may stand for _. The defaults shown are the recipe's (--recipe) and the libraries'. --config FILE takes flags from a
file, --debug shows tracebacks.\
"""
    MAIN_FLAGS: ClassVar = MAIN_FLAGS
    REFUSED: ClassVar = REFUSED
    RANGES: ClassVar = RANGES

    @staticmethod
    def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what lies between TRL's defaults and what is given: LoRA's, the machine's, the recipe's."""
        check_installed(given.get("deepspeed"))
        lora = {flag: PatConfig.__dataclass_fields__[name].default for name, flag in _LORA.items()}
        return {**lora, **_machine_defaults(given), **recipe_defaults(given.get("recipe", RunOptions.recipe))}

    def __post_init__(self) -> None:
        check_request(self.pat)
        check_writable(self.output_dir)
        if self.sft.eval_strategy != "no" and self.run.held_out in ("0", 0):
            raise PatError(
                f"Got eval_strategy={str(self.sft.eval_strategy)!r} with held_out=0; expected rows to evaluate on: "
                "leave --held_out at its default, or set --eval_strategy no."
            )
        for name in _MAPPINGS:
            if not isinstance(value := getattr(self.sft, name), Mapping | None):
                raise PatError(f"Got {name}={value!r}; expected a mapping in JSON.")
        if self.sft.activation_offloading and not torch.accelerator.is_available():
            raise PatError(
                "Got activation_offloading on a machine without an accelerator to offload from; leave it out."
            )
        if self.run.streaming:
            check_streaming(self.run, self.sft, self.distill)
        # The trainer writes its checkpoints below the run's folder, whose other names are the product's.
        self.sft.output_dir = str(self.output_dir / CHECKPOINTS)
        self.sft.push_to_hub = False  # the trainers would push their checkpoints
        self.sft.hub_token = None  # they would write it into every checkpoint, as part of their arguments

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.output_dir)

    def pat_config(self) -> PatConfig:
        """Return the adapter's configuration."""
        lora = {name: getattr(self.model, flag) for name, flag in _LORA.items()}
        targets = lora["target_modules"]
        if isinstance(targets, str) and _NAME.fullmatch(targets):
            lora["target_modules"] = [targets]  # TRL makes text of a single name, which peft takes for a pattern
        return PatConfig(
            task_type="CAUSAL_LM", **lora, **{f.name: getattr(self.pat, f.name) for f in fields(PatOptions)}
        )


def build_arguments(**flags: Any) -> TuneArguments:
    """Build arguments from keywords named like the flags of `pat tune`, over a recipe's defaults.

    Raises:
        PatError: an unknown keyword, a value that does not fit, or an unknown recipe.
    """
    return OptionsParser("pat tune", TuneArguments).build(flags)


def _machine_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from TRL's defaults by machine.

    With an accelerator the base is loaded in its checkpoint's dtype (TRL would load float32, twice the memory).
    Without one, TRL's recomputing of activations only costs time, and arithmetic in bf16 is many times slower on most
    CPUs than in float32, so that bf16 autocast is taken only where it has been measured to pay.
    """
    if torch.accelerator.is_available():
        return {"dtype": "auto"}
    return {"use_cpu": True, "bf16": _bf16_pays(given), "gradient_checkpointing": False, "dtype": "float32"}


def _bf16_pays(given: Mapping[str, Any]) -> bool:
    """Tell whether bf16 autocast pays on this CPU for the model that was given, unless the flags say what is wanted."""
    name = given.get("model_name_or_path")
    if name is None or given.keys() & {"bf16", "fp16", "dtype"}:
        return False
    if (known := _bf16_of_run(given.get("output_dir"))) is not None:
        return known
    try:
        config, family = load_config(str(name), revision=given.get("model_revision"))
    except PatError:
        return False  # said where the run is checked
    sizes = getattr(config, family.hidden_size_field), getattr(config, "intermediate_size", None)
    with phase("Measuring whether bf16 is faster on this CPU"):
        return bf16_pays_on_cpu(sizes[0], sizes[1] or sizes[0])


def _bf16_of_run(output_dir: Any) -> bool | None:
    """Return what was chosen for the run in a folder, which goes on as it began; None if there is none."""
    try:
        known = json.loads((Path(expand(str(output_dir))) / RUN_FILE).read_text(encoding="utf-8")).get("bf16")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return known if isinstance(known, bool) else None
