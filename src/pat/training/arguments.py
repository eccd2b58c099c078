"""What `pat tune` can be told: TRL's own flags, the method's, and a recipe of defaults under them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from pat.config_file import read_config, split_config
from pat.errors import PatError
from pat.training.help import USAGE, Formatter, render_help, unknown_flags
from pat.tuner.config import PatConfig
from pat.tuner.options import PatOptions

RECIPES = ("default", "paper")

_OUR_HELP = {
    "model_name_or_path": "Base model: a folder or a hub id.",
    "output_dir": "Where the run goes, a new or empty folder: model/, adapter/, compact/, results.json.",
}
"""What flags of the libraries mean here."""


@dataclass
class RunOptions:
    """Data and housekeeping of one run."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or a local .json, .jsonl, .parquet or .csv file; its format is detected. "
            "task:arc_easy,piqa (task:FOLDER/arc_easy,piqa for <task>.train.jsonl files) is the train split of tasks."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub dataset to train on."})
    template: str = field(
        default="auto",
        metadata={"help": "How instructions become prompts: 'chat', 'alpaca', or 'auto' (chat if the tokenizer can)."},
    )
    held_out: str | None = field(
        default=None,
        metadata={
            "help": "Rows kept apart for the final figures: a number, a share, or a file. Default: 1 in 50, up to 200."
        },
    )
    recipe: str = field(
        default="default", metadata={"help": "Defaults under all other flags: 'default' (ours) or 'paper'."}
    )
    no_compact: bool = field(
        default=False,
        metadata={"help": "Train at full width to the end, instead of shrinking the model at the milestone."},
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Leave the trainer's checkpoints in OUTPUT_DIR/checkpoints after success."}
    )


@dataclass(frozen=True)
class TuneArguments:
    """A parsed command line of `pat tune`."""

    run: RunOptions
    pat: PatOptions
    sft: SFTConfig
    model: ModelConfig
    output_dir: Path

    def pat_config(self) -> PatConfig:
        """Return the adapter's configuration."""
        model = self.model
        options = {f.name: getattr(self.pat, f.name) for f in fields(PatOptions)}
        return PatConfig(
            task_type="CAUSAL_LM",
            r=model.lora_r,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            target_modules=model.lora_target_modules,
            target_parameters=model.lora_target_parameters,
            modules_to_save=model.lora_modules_to_save,
            use_rslora=model.use_rslora,
            use_dora=model.use_dora,
            **options,
        )


class Parser(TrlParser):
    """TRL's parser with our flags first in its help, and errors as `PatError` (one line) instead of a page of usage."""

    def __init__(self) -> None:
        dataclasses: list[Any] = [RunOptions, PatOptions, SFTConfig, ModelConfig]
        super().__init__(dataclasses, prog="pat tune", usage=USAGE, formatter_class=Formatter, allow_abbrev=False)
        for action in self._actions:
            action.help = _OUR_HELP.get(action.dest, action.help)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise PatError(f"{message} (see `pat tune --help`).")

    def format_help(self) -> str:
        """Return the help page, in sections by where a flag comes from."""
        owners: dict[str, Any] = {
            "data and run": RunOptions,
            "pruning": PatOptions,
            "model and adapter (TRL's ModelConfig)": ModelConfig,
            "training (TRL's SFTConfig, transformers' TrainingArguments)": SFTConfig,
        }
        names = {heading: [f.name for f in fields(owner)] for heading, owner in owners.items()}
        return render_help(self, [*names.items(), ("other", ("help",))])


def parse_arguments(argv: Sequence[str]) -> TuneArguments:
    """Parse a command line: recipe below `--config` file below flags.

    Raises:
        PatError: an unknown flag, a value of the wrong type, an unknown recipe, or a config file that cannot be read.
    """
    parser = Parser()
    path, flags = split_config(argv)
    config = {} if path is None else read_config(path)
    _set_environment(config.pop("env", {}))
    parser.set_defaults_with_config(**_machine_defaults())
    parser.set_defaults_with_config(**recipe_defaults(_value_of(flags, "--recipe") or config.get("recipe", "default")))
    unknown = parser.set_defaults_with_config(**config)
    if unknown:
        parser.error(f"{path}: {unknown_flags(unknown, parser)}")
    try:
        with _trls_own_deprecations_ignored():
            parsed: Any = parser.parse_args_into_dataclasses(
                flags, return_remaining_strings=True, look_for_args_file=False
            )
    except (ValueError, TypeError, OSError) as error:
        raise PatError(f"{' '.join(str(error).split())} (see `pat tune --help`).") from error
    run, pat, sft, model, rest = parsed
    if rest:
        parser.error(unknown_flags(rest, parser))
    return _bundle(run, pat, sft, model)


def build_arguments(**flags: Any) -> TuneArguments:
    """Build arguments from keywords named like the flags of `pat tune`, over a recipe's defaults.

    Raises:
        PatError: an unknown keyword, a value that does not fit, or an unknown recipe.
    """
    merged = {**_machine_defaults(), **recipe_defaults(flags.get("recipe", "default")), **flags}
    try:
        with _trls_own_deprecations_ignored():
            run, pat, sft, model = Parser().parse_dict(merged)
    except (ValueError, TypeError) as error:
        raise PatError(" ".join(str(error).split())) from error
    return _bundle(run, pat, sft, model)


def _bundle(run: RunOptions, pat: PatOptions, sft: SFTConfig, model: ModelConfig) -> TuneArguments:
    needed = {
        "--model_name_or_path": model.model_name_or_path,
        "--dataset_name": run.dataset_name,
        "--output_dir": sft.output_dir,
    }
    for flag, value in needed.items():
        if not value:
            raise PatError(
                f"{flag} is missing; expected a base model, a data file and an output folder (see `pat tune --help`)."
            )
    if sft.eval_strategy != "no" and run.held_out in ("0", 0):
        raise PatError(
            f"Got eval_strategy={str(sft.eval_strategy)!r} with held_out=0; expected rows to evaluate on: leave "
            "--held_out at its default, or set --eval_strategy no."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PatError(
            f"Got {os.environ['WORLD_SIZE']} processes; `pat tune` runs in one. Train with PatCallback in a script of "
            "your own, and merge with `pat merge`."
        )
    output_dir = Path(str(sft.output_dir))
    # The trainer writes its checkpoints below the run's folder, whose other names are the product's.
    sft.output_dir = str(output_dir / "checkpoints")
    return TuneArguments(run, pat, sft, model, output_dir)


@contextmanager
def _trls_own_deprecations_ignored() -> Iterator[None]:
    """Silence what transformers says about the old name of a flag that TRL's defaults still use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
        yield


def _machine_defaults() -> dict[str, Any]:
    """Return what differs from TRL's defaults by machine.

    With an accelerator the base is loaded in its checkpoint's dtype (TRL would load float32, twice the memory).
    Without one, TRL's bf16 autocast is refused and its recomputing of activations only costs time, and arithmetic in
    bf16 is many times slower on most CPUs than in float32.
    """
    everywhere = {"output_dir": ""}  # instead of a folder of transformers' own choice
    if torch.accelerator.is_available():
        return everywhere | {"dtype": "auto"}
    return everywhere | {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dtype": "float32"}


def recipe_defaults(name: str) -> dict[str, Any]:
    """Return the flags a recipe stands for.

    Raises:
        PatError: no such recipe.
    """
    if name not in RECIPES:
        raise PatError(f"Got recipe={name!r}; expected one of {', '.join(RECIPES)}.")
    text = resources.files("pat.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return {"recipe": name, **yaml.safe_load(text)}


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    for index, item in enumerate(argv):
        if item == flag and index + 1 < len(argv):
            return argv[index + 1]
        if item.startswith(flag + "="):
            return item.partition("=")[2]
    return None


def _set_environment(variables: Any) -> None:
    """Set what a config file lists under `env`, as TRL's parser does."""
    if not isinstance(variables, dict):
        raise PatError(f"Got env: {variables!r} in the config file; expected a mapping of names to values.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
