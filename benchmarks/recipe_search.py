"""Default recipe against the paper's method and plain LoRA: one cell per call, held-out response NLL.

Each cell trains the same number of steps on the same batches (same seed) and appends one line to a JSON-lines file, so
that a search is a list of calls, in any order, and repeats nothing it already holds. `--summary` prints the best cell
of each recipe.

    python benchmarks/recipe_search.py --model .models/smollm2 --data ../shared/data/instruct/instruct_21k.jsonl \
        --recipe default --learning_rate 5e-4 --mask_lr_multiplier 40 --output benchmarks/results/recipe_search.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from pat.evaluation.perplexity import response_nll, tokenize_examples
from pat.training.callback import PatCallback
from pat.training.data import load_training_data
from pat.tuner import PatConfig, find_tuner


def main() -> None:
    """Run one cell, or print the summary of a results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--recipe", choices=["lora", "paper", "default"], required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--mask_lr_multiplier", type=float, default=40.0)
    parser.add_argument("--operator_lr_multiplier", type=float, default=1.0)
    parser.add_argument("--milestone", type=float)
    parser.add_argument("--pruning_ratio", type=float, default=0.25)
    parser.add_argument("--operator_rank", type=int)
    parser.add_argument("--active_loss_weight", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=20)
    parser.add_argument("--lora_alpha", type=int, default=40)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_eval_length", type=int, default=256)
    parser.add_argument("--num_eval", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--scheduler", default="cosine")
    parser.add_argument("--use_rslora", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further PatConfig fields")
    parser.add_argument("--tag", default="")
    args = parser.parse_args()

    cell = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("output", "model", "data")
    }
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if any(row["cell"] == cell for row in done):
        return
    row = run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as file:
        file.write(json.dumps({"cell": cell} | row) + "\n")
    print(json.dumps({"cell": cell} | row))


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

    lora = {"task_type": "CAUSAL_LM", "r": args.r, "lora_alpha": args.lora_alpha, "use_rslora": args.use_rslora}
    if args.recipe == "lora":
        config = LoraConfig(**lora, target_modules="all-linear")
    else:
        paper = args.recipe == "paper"
        milestone = args.milestone if args.milestone is not None else (1 / 3 if paper else 0.1)
        config = PatConfig(
            **lora,
            pruning_ratio=args.pruning_ratio,
            operator_rank=args.operator_rank,
            rotation="none" if paper else "auto",
            milestone=milestone,
            mask_lr_multiplier=args.mask_lr_multiplier,
            operator_lr_multiplier=args.operator_lr_multiplier,
            active_loss_weight=args.active_loss_weight,
            **{k: json.loads(v) for k, v in (item.split("=", 1) for item in args.set)},
        )
    model = get_peft_model(base, config)
    tuner = find_tuner(model)

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        from pat.evaluation.perplexity import batches_from_examples

        return next(iter(batches_from_examples(examples, batch_size=len(examples), pad_token_id=pad)))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type=args.scheduler,
                warmup_steps=0,
                bf16=args.bf16,
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
