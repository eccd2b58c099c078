"""What `pat tune --help` says: a page to start with, then every flag, ours before those of the libraries."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

USAGE = "pat tune --model_name_or_path M --dataset_name D --output_dir OUT [--pruning_ratio R] [--flag value ...]"

DESCRIPTION = """\
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

MAIN_FLAGS = (
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
"""Flags that most runs set; they open the list, and are not repeated below."""

Section = tuple[str, Iterable[str]]
"""A heading, and the names of the flags under it."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, and its default unless there is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or not action.dest or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def render_help(parser: argparse.ArgumentParser, sections: Sequence[Section]) -> str:
    """Render a help page whose flags stand in the order of the sections, each flag once."""
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    for heading, names in (("main flags", MAIN_FLAGS), *sections):
        formatter.start_section(heading)
        for name in names:
            formatter.add_arguments(actions.pop(name, []))
        formatter.end_section()
    usage, _, flags = formatter.format_help().partition("\n\n")
    return f"{usage}\n\n{DESCRIPTION}\n\n{flags}"


def unknown_flags(given: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Say which flags are not known, and which were perhaps meant."""
    flags = [item.partition("=")[0] for item in given if item.startswith("--")]
    if not flags:
        return f"Got {' '.join(given)!r} without a flag before it"
    known: Any = parser._option_string_actions
    near = [match for flag in flags for match in difflib.get_close_matches(flag, known, n=1)]
    guess = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"Got the unknown flag{'s' * (len(flags) > 1)} {', '.join(flags)}{guess}"
