"""A LoRA script with the Trainer of transformers, and the three lines that make the model smaller as well.

    python examples/plain_transformers.py BASE TEXT OUT

BASE is a model folder or hub id, TEXT a text file with one passage on each line. OUT is the small model.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from pat import PatCallback, PatConfig  # 1. beside peft's LoraConfig


def main(base: str, text: str, out: str, **more: Any) -> None:
    """Tune on plain text and write the small model; `more` are arguments of the trainer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("text", data_files=text, split="train")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = get_peft_model(model, PatConfig(task_type="CAUSAL_LM", r=16, pruning_ratio=0.25))  # 2. for LoraConfig
    trainer = Trainer(
        model=model,
        args=TrainingArguments(f"{out}-checkpoints", learning_rate=2e-4, report_to="none", **more),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[PatCallback()],  # 3.
    )
    trainer.train()
    model.merge_and_unload().save_pretrained(out)  # as with LoRA, but smaller
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
