"""Supervised fine-tuning that makes the model smaller, then preferences (DPO) on the small model.

    python examples/sft_then_dpo.py BASE DATA PREFERENCES OUT

BASE is a model folder or hub id, DATA a file as `pat tune` reads them, PREFERENCES a file of JSON lines with `prompt`,
`chosen` and `rejected`. OUT/sft/model is the small model, OUT/dpo what DPO has made of it. Preferences come second on
purpose: while a model is cut, it is no longer the one whose answers were judged.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import pat


def main(base: str, data: str, preferences: str, out: str, **more: Any) -> None:
    """Tune and prune, then align; `more` are arguments of both trainers."""
    result = pat.tune(
        model_name_or_path=base, dataset_name=data, output_dir=f"{out}/sft", pruning_ratio=0.25, max_length=512, **more
    )
    small = str(result.model_dir)  # an ordinary checkpoint: nothing below knows of pat
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(small, dtype="auto"),
        args=DPOConfig(output_dir=f"{out}/dpo/checkpoints", learning_rate=5e-5, report_to="none", **more),
        train_dataset=load_dataset("json", data_files=preferences, split="train"),
        processing_class=AutoTokenizer.from_pretrained(small),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(f"{out}/dpo")
    trainer.processing_class.save_pretrained(f"{out}/dpo")


if __name__ == "__main__":
    main(*sys.argv[1:5])
