"""Default recipe against the paper's method and plain LoRA: one cell per call, held-out response NLL.

Each cell trains the same number of steps on the same batches (same seed) and appends one line to a JSON-lines file, so
that a search is a list of calls, in any order, and repeats nothing it already holds. `--summary` prints a table. Values
that are not given come from the recipe as `pat tune` has it.

    python benchmarks/recipe_search.py --model .models/smollm2 --data ../shared/data/instruct/instruct_21k.jsonl \
        --recipe default --learning_rate 5e-4 --output benchmarks/results/recipe_search.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from compare.tokens import tokenize_examples
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from pat.data.load import load_training_data
from pat.nll import batches_from_examples, response_nll
from pat.recipes import recipe_defaults
from pat.training.callbacks.callback import PatCallback
from pat.tuner import PatConfig, find_tuner

SEARCHED = ("recipe", "learning_rate", "mask_lr_multiplier", "milestone", "lora_alpha")
"""What a summary shows of a cell."""


def main() -> None:
    """Run one cell, or print the summary of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--summary", action="store_true", help="Print what the file holds, and run nothing.")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--recipe", choices=["lora", "paper", "default"], default="default")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_eval_length", type=int, default=256)
    parser.add_argument("--num_eval", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pruning_ratio", type=float, default=0.25)
    for flag, kind in OVERRIDES.items():
        parser.add_argument(f"--{flag}", type=kind, help="Instead of the recipe's value.")
    args = parser.parse_args()

    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if args.summary:
        print_summary(done)
        return
    cell = {key: value for key, value in vars(args).items() if key not in ("output", "summary", "model", "data")}
    cell |= {"model": Path(args.model).name, "data": Path(args.data).name, **hyperparameters(args)}
    if any(row["cell"] == cell for row in done):
        return
    row = {"cell": cell} | run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


OVERRIDES: dict[str, type] = {
    "learning_rate": float,
    "mask_lr_multiplier": float,
    "operator_lr_multiplier": float,
    "milestone": float,
    "lora_r": int,
    "lora_alpha": int,
}


def hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe's values for what this benchmark takes from it, with the overrides on top.

    Batch, length and steps are the benchmark's own; plain LoRA takes the default recipe's adapter.
    """
    recipe = recipe_defaults("paper" if args.recipe == "paper" else "default")
    names = [*OVERRIDES, "rotation", "use_rslora", "lr_scheduler_type"]
    defaults = {**vars(PatConfig()), "lora_r": PatConfig.r} | recipe
    chosen = {name: defaults[name] for name in names}
    return chosen | {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print every cell as a Markdown table, best first within a recipe."""
    print("| " + " | ".join([*SEARCHED, "held-out NLL", "seconds"]) + " |")
    print("|---" * (len(SEARCHED) + 2) + "|")
    for row in sorted(rows, key=lambda row: (row["cell"]["recipe"], row["nll"])):
        values = [str(row["cell"].get(name)) for name in SEARCHED]
        print("| " + " | ".join([*values, f"{row['nll']:.3f}", f"{row['seconds']:.0f}"]) + " |")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train one cell and return its figures."""
    transformers.set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = load_training_data(args.data, tokenizer=tokenizer, held_out=args.num_eval, seed=args.seed)
    rows = args.steps * args.batch_size
    shuffled = data.train.shuffle(seed=args.seed).select(range(min(3 * rows, len(data.train))))
    train = tokenize_examples(tokenizer, shuffled, args.max_length)[:rows]
    held_out = tokenize_examples(tokenizer, data.held_out, args.max_eval_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    chosen = hyperparameters(args)
    lora = {
        "task_type": "CAUSAL_LM",
        "r": chosen["lora_r"],
        "lora_alpha": chosen["lora_alpha"],
        "use_rslora": chosen.get("use_rslora", False),
    }
    if args.recipe == "lora":
        config = LoraConfig(**lora, target_modules="all-linear")
    else:
        names = ("rotation", "milestone", "mask_lr_multiplier", "operator_lr_multiplier")
        options = {name: chosen[name] for name in names if name in chosen}
        config = PatConfig(**lora, **options, pruning_ratio=args.pruning_ratio)
    model = get_peft_model(base, config)
    tuner = find_tuner(model)

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return next(iter(batches_from_examples(examples, batch_size=len(examples), pad_token_id=pad)))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=chosen["learning_rate"],
                lr_scheduler_type=chosen["lr_scheduler_type"],
                warmup_steps=0,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to=[],
                logging_steps=10,
                seed=args.seed,
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=train,
            data_collator=collate,
            callbacks=[PatCallback()] if tuner is not None else [],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    after = response_nll(model, held_out, batch_size=8, pad_token_id=pad)
    return {
        "nll": after.nll,
        "eval_tokens": after.num_tokens,
        "seconds": seconds,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "width": None if tuner is None else int(tuner.mask().keep.sum()),
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
