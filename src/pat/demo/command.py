"""`pat demo`: the main job on a real model, with base and small model answering side by side at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pat.checkpoint.staging import check_output_folder
from pat.demo.data import SAMPLE_PROMPTS, demo_data_path
from pat.demo.model import prepare_smollm2
from pat.demo.options import DemoOptions
from pat.loading import load_tokenizer
from pat.training.arguments import build_arguments
from pat.training.results import TuneResult
from pat.training.summary import print_summary
from pat.training.tune import run_tune

RECIPE: dict[str, Any] = {
    # About ten minutes of training on two cores. The cut is mild, because so few steps cannot give a model of 135 M
    # parameters back what a larger cut takes: after 25 % its answers are no longer sensible.
    "pruning_ratio": 0.125,
    "max_steps": 150,
    "per_device_train_batch_size": 4,
    "max_length": 128,
    "learning_rate": 5e-4,
    "milestone": 0.1,
    "held_out": 64,
    "dataset_train_split": "train[:2000]",
    "save_strategy": "no",
    "logging_steps": 10,
}

MAX_NEW_TOKENS = 60


@dataclass(frozen=True)
class Sample:
    """One prompt and both models' greedy answers."""

    prompt: str
    base: str
    small: str


@dataclass(frozen=True)
class Demo:
    """What a demo came to."""

    run: TuneResult
    samples: list[Sample]


def run_demo(options: DemoOptions) -> Demo:
    """Prepare the demo model, tune and prune it, and have base and small model answer the same prompts.

    The output folder is that of `pat tune`, plus `samples.md`.

    Raises:
        PatError: the output folder is in use, or the base model cannot be prepared.
        RunFailed: see `pat.tune`.
    """
    console = Console()
    check_output_folder(options.output_dir)
    base = prepare_smollm2(options.cache_dir, progress=console.print)
    data = options.dataset_name or str(demo_data_path())
    chosen = {"pruning_ratio": options.pruning_ratio, "max_steps": options.max_steps}
    flags = RECIPE | {flag: value for flag, value in chosen.items() if value is not None}
    console.print(
        f"Tuning {base.name} on {Path(data).name}: {flags['max_steps']} steps, cutting {flags['pruning_ratio']:.1%}"
    )
    result = run_tune(
        build_arguments(model_name_or_path=str(base), dataset_name=data, output_dir=options.output_dir, **flags)
    )
    samples = answer_side_by_side(base, result.model_dir)
    (options.output_dir / "samples.md").write_text(_as_markdown(samples), encoding="utf-8")
    return Demo(result, samples)


def answer_side_by_side(base: Path, small: Path) -> list[Sample]:
    """Answer the sample prompts greedily with two checkpoints."""
    answers = [
        _answers(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), load_tokenizer(str(folder)))
        for folder in (base, small)
    ]
    return [Sample(*row) for row in zip(SAMPLE_PROMPTS, *answers, strict=True)]


@torch.no_grad()
def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    answers = []
    for prompt in SAMPLE_PROMPTS:
        inputs: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[operator]
        new = output[0][inputs["input_ids"].shape[1] :]
        answers.append(" ".join(str(tokenizer.decode(new, skip_special_tokens=True)).split()))
    return answers


def print_demo(demo: Demo) -> None:
    """Print the figures of the run, and both models' answers."""
    print_summary(demo.run)
    table = Table(title="Greedy answers", show_lines=True)
    for heading in ("prompt", "base", "small"):
        table.add_column(heading, overflow="fold")
    for sample in demo.samples:
        table.add_row(sample.prompt, sample.base, sample.small)
    Console().print(table)


def _as_markdown(samples: list[Sample]) -> str:
    parts = [f"## {sample.prompt}\n\n**Base:** {sample.base}\n\n**Small:** {sample.small}\n" for sample in samples]
    return "# Greedy answers of base and small model\n\n" + "\n".join(parts)
