"""What pruning costs before and after a short tuning: held-out NLL of every baseline at the same number of parameters.

    python benchmarks/baselines_nll.py --model ../shared/data/models/stories260K \
        --data ../shared/data/instruct/instruct_21k.jsonl --seeds 0,1,2 --tune_steps 60 \
        --output benchmarks/results/baselines_nll.json

The budget is that of PAT's dense model at `--pruning_ratio` of the hidden size. A seed decides the calibration text,
the random channels, LoRA's initialisation and the order of the tuning data; the rows held out are always the same.
Tuning is LoRA on all linear layers with the same rank, steps, learning rate and data for every method. Results of other
models in the output file stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from compare.baselines import METHODS, Pruned, calibration_sequences, num_parameters, pat_parameters, prune
from compare.budget import lora_targets
from compare.tokens import tokenize_examples
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pat.data.load import TrainingData, load_training_data
from pat.loading import load_base, load_tokenizer
from pat.nll import Example, response_nll
from pat.report.records import environment
from pat.widths import choose_width

MUST_BEAT_RANDOM = ("llm_pruner", "slicegpt")
"""Methods that are broken if random channels lose less than they do."""

STAGES = ("nll_before", "nll_after")

NO_SETTINGS = ("model", "data", "output", "seeds", "methods")
"""Arguments that the record holds elsewhere."""


def main() -> None:
    """Measure all methods and seeds, and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--pruning_ratio", type=float, default=0.25)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--num_calibration", type=int, default=16, help="sequences of max_length tokens")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tune_steps", type=int, default=0, help="0: before tuning only")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--lora_r", type=int, default=20)
    args = parser.parse_args()
    disable_progress_bars()

    tokenizer = load_tokenizer(args.model)
    model = load_base(args.model, dtype=torch.float32)
    data = load_training_data(args.data, tokenizer=tokenizer, held_out=args.held_out, seed=0)
    assert data.held_out is not None
    held_out = tokenize_examples(tokenizer, data.held_out, args.max_length)
    width = choose_width(model.config.hidden_size, model.config.num_attention_heads, pruning_ratio=args.pruning_ratio)
    base = evaluate(model, held_out, args, tokenizer)
    record: dict[str, Any] = {
        **environment(),
        "settings": {key: value for key, value in vars(args).items() if key not in NO_SETTINGS},
        "data": Path(args.data).name,
        "base": {"nll": base, "num_parameters": num_parameters(model)},
        "hidden_size": width.hidden_size,
        "pruned_hidden_size": width.pruned_hidden_size,
        "hidden_size_ratio": width.pruned_hidden_size / width.hidden_size,
        "target_parameters": pat_parameters(model, width.pruned_hidden_size),
        "cells": [],
    }
    for seed in map(int, args.seeds.split(",")):
        for method in args.methods.split(","):
            cell = measure(method, model, tokenizer, data, held_out, record, seed, args)
            print(json.dumps(cell), flush=True)
            record["cells"].append(cell)
            record |= {"mean": means(record["cells"]), "mark": marks(record["cells"])}
            write(args.output, Path(args.model).name, record)
    print(json.dumps({"mean": record["mean"], "mark": record["mark"]}))


def measure(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    held_out: Sequence[Example],
    record: dict[str, Any],
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Prune, evaluate, tune if asked for, and evaluate again."""
    start = time.perf_counter()
    calibration = calibration_sequences(
        tokenizer, data.train, num_sequences=args.num_calibration, length=args.max_length, seed=seed
    )
    pruned = prune(
        method,
        model,
        target_parameters=record["target_parameters"],
        pruned_hidden_size=record["pruned_hidden_size"],
        calibration=calibration,
        seed=seed,
    )
    cell: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "num_parameters": pruned.num_parameters,
        "parameter_ratio": pruned.num_parameters / record["base"]["num_parameters"],
        "description": pruned.description,
        "seconds_pruning": time.perf_counter() - start,
        "nll_before": evaluate(pruned.model, held_out, args, tokenizer),
    }
    if args.tune_steps:
        tuned, losses = tune(pruned, lora_targets(model), tokenizer, data.train, seed, args)
        trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        cell |= {"nll_after": evaluate(tuned, held_out, args, tokenizer), "num_trainable": trainable, "losses": losses}
    return cell


def tune(
    pruned: Pruned,
    targets: list[str],
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    seed: int,
    args: argparse.Namespace,
) -> tuple[PeftModel, list[float]]:
    """Tune by LoRA with TRL's trainer; return the adapted model and the logged losses."""
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=2 * args.lora_r,
        use_rslora=True,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            max_steps=args.tune_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            max_length=args.max_length,
            logging_steps=max(1, args.tune_steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
            seed=seed,
        )
        # Only the rows that will be seen need to be tokenised; some are dropped, as too long.
        num_rows = min(len(train), 2 * args.tune_steps * args.batch_size)
        rows = train.shuffle(seed=seed).select(range(num_rows))
        trainer = SFTTrainer(
            pruned.model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
    return cast(PeftModel, trainer.model), [row["loss"] for row in trainer.state.log_history if "loss" in row]


def evaluate(
    model: nn.Module, held_out: Sequence[Example], args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> float:
    """Mean NLL of the held-out response tokens."""
    return response_nll(model, held_out, batch_size=args.batch_size, pad_token_id=tokenizer.pad_token_id or 0).nll


def means(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean NLL over seeds, by method and stage."""
    result: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        result[method] = {s: statistics.mean(cell[s] for cell in own) for s in STAGES if all(s in cell for cell in own)}
    return result


def marks(cells: list[dict[str, Any]]) -> dict[str, bool]:
    """For each method that must, before and after tuning: does it lose less than random channels with every seed?"""
    result = {}
    for stage in STAGES:
        nll = {(cell["method"], cell["seed"]): cell[stage] for cell in cells if stage in cell}
        for method in MUST_BEAT_RANDOM:
            pairs = [(own, nll.get(("random", seed))) for (name, seed), own in nll.items() if name == method]
            if pairs and None not in dict(pairs).values():
                result[f"{method}, {stage}"] = all(own < random for own, random in pairs)
    return result


def write(path: Path, model: str, record: dict[str, Any]) -> None:
    """Put one model's record into the output file, beside those of others."""
    results = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results | {model: record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
