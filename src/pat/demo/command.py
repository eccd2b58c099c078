"""`pat demo`: the main job on a real model, with base and small model answering side by side at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import pipeline

from pat.checkpoint.places import RESULTS
from pat.data.load import load_training_data
from pat.demo.data import SAMPLE_PROMPTS, demo_data_path
from pat.demo.model import prepare_smollm2
from pat.demo.options import DemoOptions
from pat.report.progress import phase, quiet_transformers
from pat.report.records import Record
from pat.report.table import Table
from pat.training.arguments import build_arguments
from pat.training.outcome.results import TuneRecord, TuneResult
from pat.training.outcome.samples import Sample
from pat.training.outcome.summary import print_summary
from pat.training.tune import run_tune

RECIPE: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_length": 128,
    "refit_tokens": 8192,  # a third of the default, which takes minutes on two cores
    # Quicker than PyTorch's fused attention on a CPU for texts as short as these (docs/results.md).
    "attn_implementation": "eager",
    "held_out": 64,
    "dataset_train_split": "train[:2000]",
    "save_strategy": "no",
}

MAX_NEW_TOKENS = 60


@dataclass(frozen=True, kw_only=True)
class DemoRecord(Record):
    """The result of a demo."""

    command: Literal["demo"] = "demo"
    output_dir: Path
    run: TuneRecord
    samples: list[Sample]


def run_demo(options: DemoOptions) -> DemoRecord | None:
    """Prepare the demo model, tune and prune it, and have base and small model answer the same prompts.

    The output folder is that of `pat tune`, plus `samples.md`. With `ui` a page is served instead.

    Raises:
        PatError: the data cannot be read, or the base model cannot be prepared.
        RunFailed: see `pat.tune`.
    """
    data = options.dataset_name or str(demo_data_path())
    # What is wrong with the data is to be said before the download of the base.
    load_training_data(data, split=RECIPE["dataset_train_split"], held_out=RECIPE["held_out"])
    base = prepare_smollm2(options.cache_dir, progress=print)
    if options.ui:
        from pat.demo.ui import Session, serve

        session = Session(base, options.output_dir, RECIPE | {"dataset_name": data})
        serve(session, ratio=options.pruning_ratio, num_steps=options.max_steps, port=options.port)
        return None
    if (options.output_dir / RESULTS).is_file():
        print(f"{options.output_dir} holds a finished run already: its models answer again, and nothing is trained.")
    else:
        warned = "a warning follows that these are few rows, as they have to be in a demo"
        few = "" if options.dataset_name else f"; {warned}"
        doing = f"{options.max_steps} steps, cutting {options.pruning_ratio:.1%}{few}"
        print(f"Tuning {base.name} on {Path(data).name}: {doing}")
    result = run_tune(
        build_arguments(
            model_name_or_path=str(base),
            dataset_name=data,
            output_dir=options.output_dir,
            pruning_ratio=options.pruning_ratio,
            max_steps=options.max_steps,
            **RECIPE,
        )
    )
    answers = [_answers(folder) for folder in (base, result.model_dir)]
    samples = [Sample(*row) for row in zip(SAMPLE_PROMPTS, *answers, strict=True)]
    (options.output_dir / "samples.md").write_text(_as_markdown(samples), encoding="utf-8")
    return DemoRecord(output_dir=options.output_dir, run=result.record, samples=samples)


def _answers(checkpoint: Path) -> list[str]:
    """Answer the sample prompts greedily."""
    with phase(f"Answering prompts with {checkpoint.name}"), quiet_transformers():
        answer: Any = pipeline("text-generation", model=str(checkpoint))
        chats = [[{"role": "user", "content": prompt}] for prompt in SAMPLE_PROMPTS]
        outputs = answer(chats, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_full_text=False)
    return [" ".join(output["generated_text"].split()) for (output,) in outputs]


def print_demo(record: DemoRecord | None) -> None:
    """Print the figures of the run, and both models' answers."""
    if record is None:
        return
    print_summary(TuneResult(record.output_dir, record.run))
    rows = [(sample.prompt, sample.base, sample.small) for sample in record.samples]
    Table("Greedy answers", ("prompt", "base", "small"), rows, num_text_columns=3).print()


def _as_markdown(samples: list[Sample]) -> str:
    parts = [f"## {sample.prompt}\n\n**Base:** {sample.base}\n\n**Small:** {sample.small}\n" for sample in samples]
    return "# Greedy answers of base and small model\n\n" + "\n".join(parts)
