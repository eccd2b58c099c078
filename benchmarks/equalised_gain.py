"""What the tied block form costs before any tuning: held-out NLL of the base and of the freshly calibrated adapter.

    python benchmarks/equalised_gain.py --model .models/smollm2 --data ../shared/data/instruct/instruct_21k.jsonl \
        --output benchmarks/results/equalised_gain.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

import torch
from compare.tokens import tokenize_examples
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from pat.data.load import load_training_data
from pat.loading import load_tokenizer
from pat.nll import batches_from_examples, response_nll
from pat.report.records import environment
from pat.tuner import PatConfig, PatModel, find_tuner


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--num_eval", type=int, default=100)
    parser.add_argument("--max_length", type=int, default=256)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    data = load_training_data(args.data, tokenizer=tokenizer, held_out=args.num_eval, seed=0)
    held_out = tokenize_examples(tokenizer, data.held_out, args.max_length)
    sample = tokenize_examples(tokenizer, data.train.shuffle(seed=0).select(range(200)), args.max_length)
    pad = cast(int, tokenizer.pad_token_id)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        PatConfig(task_type="CAUSAL_LM", axes=["hidden"]),
    )
    tuner = cast(PatModel, find_tuner(model))
    before = response_nll(model, held_out, batch_size=8, pad_token_id=pad)
    order = tuner.calibrate(batches_from_examples(sample, batch_size=4, pad_token_id=pad))
    assert order is not None, "a hidden size that is cut has an order"
    after = response_nll(model, held_out, batch_size=8, pad_token_id=pad)
    record = {
        **environment(),
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "num_tokens": before.num_tokens,
        "nll_base": before.nll,
        "nll_calibrated": after.nll,
        "difference": after.nll - before.nll,
        "num_pinned": int(order.pinned.sum()),
        "energy_kept": order.energy_kept,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
