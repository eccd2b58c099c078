"""Does a teacher help? Held-out NLL of `pat tune` with and without `--distill`, at equal steps; the cells "as long"
are for equal FLOPs.

    python benchmarks/teacher_nll.py --model tests/data/stories260K --data ../shared/data/instruct/instruct_21k.jsonl \
        --output benchmarks/results/teacher_nll.jsonl --seeds 0 1

Counted in forward passes of the whole model, a step of LoRA takes two (one back), three quarters of that where a
quarter is cut, and the teacher one; the runs named "as long" take as many more steps without it. Every run is a line of
the output, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import pat

NUM_ROWS, NUM_HELD_OUT, STEPS, RATIO = 4000, 200, 100, 0.25

SETTINGS: dict[str, Any] = {
    "max_length": 384,
    "per_device_train_batch_size": 8,
    "lora_r": 8,
    "learning_rate": 3e-3,
    "pruning_ratio": RATIO,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 10,
}

CELLS: dict[str, dict[str, Any]] = {}
for milestone in (0.02, 0.333):
    soft = round(milestone * STEPS)
    cost = 2 * soft + (2 * (1 - RATIO) + 1) * (STEPS - soft)
    longer = round(cost / (2 * milestone + 2 * (1 - RATIO) * (1 - milestone)))
    name = f"milestone {milestone}"
    CELLS[name] = {"milestone": milestone}
    CELLS[f"{name}, distilled"] = {"milestone": milestone, "distill": True}
    CELLS[f"{name}, as long"] = {"milestone": milestone, "max_steps": longer}
CELLS["milestone 0.02, distilled from a tuned model"] = {"milestone": 0.02, "teacher": "tuned"}


def main() -> None:
    """Run what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    args = parser.parse_args()
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    with tempfile.TemporaryDirectory() as folder, args.data.open() as file:
        lines = list(islice(file, NUM_ROWS + NUM_HELD_OUT))
        for part, rows in (("train", lines[:NUM_ROWS]), ("held_out", lines[NUM_ROWS:])):
            (Path(folder) / f"{part}.jsonl").write_text("".join(rows))
        for seed in args.seeds:
            for cell in args.cells:
                if not any(row["cell"] == cell and row["seed"] == seed for row in done):
                    row = run(args.model, Path(folder), cell, seed)
                    with args.output.open("a") as output:
                        output.write(json.dumps(row) + "\n")
                    print(cell, seed, row["nll"], flush=True)


def run(model: str, folder: Path, cell: str, seed: int) -> dict[str, Any]:
    """Run one cell."""
    flags = SETTINGS | {"max_steps": STEPS} | CELLS[cell]
    if flags.get("teacher") == "tuned":
        flags["teacher"] = str(tuned(model, folder, seed))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        result = pat.tune(
            model_name_or_path=model,
            dataset_name=str(folder / "train.jsonl"),
            held_out=str(folder / "held_out.jsonl"),
            output_dir=f"{out}/out",
            seed=seed,
            **flags,
        )
    record, figures = result.record, result.figures
    return {
        "cell": cell,
        "seed": seed,
        "nll": figures["dense"].held_out_nll,
        "nll_base": figures["base"].held_out_nll,
        "standard_error": figures["dense"].held_out_standard_error,
        "num_parameters": figures["dense"].num_parameters,
        "num_steps": record.num_steps,
        "stage_two_seconds": record.timings["stage_two_seconds"],
        "teacher_seconds": record.teacher.seconds if record.teacher else 0.0,
    }


def tuned(model: str, folder: Path, seed: int) -> Path:
    """Return the whole model, tuned with the same settings and not pruned: the teacher of one cell."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pat.training.arguments import build_arguments
    from pat.training.inputs.prepare import prepare
    from pat.training.preflight.check import check
    from pat.training.trainer import make_trainer

    target = folder / f"tuned-{seed}"
    if not target.exists():
        arguments = build_arguments(
            model_name_or_path=model,
            dataset_name=str(folder / "train.jsonl"),
            held_out=str(folder / "held_out.jsonl"),
            output_dir=str(folder / "unused"),
            seed=seed,
            max_steps=STEPS,
            **{name: value for name, value in SETTINGS.items() if name != "pruning_ratio"},
        )
        data = prepare(arguments, check(arguments).base_config)
        base = AutoModelForCausalLM.from_pretrained(model)
        config = LoraConfig(r=8, lora_alpha=arguments.model.lora_alpha, use_rslora=True, target_modules="all-linear")
        adapted: Any = get_peft_model(base, config)
        make_trainer(adapted, data.trainer_args(arguments.sft), data, folder / "checkpoints").train()
        adapted.merge_and_unload().save_pretrained(target)
        data.vocabulary.tokenizer.save_pretrained(target)
    return target


if __name__ == "__main__":
    main()
