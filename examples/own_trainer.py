"""A script of your own: pruning-aware tuning with any trainer, in one process or many.

    python examples/own_trainer.py BASE DATA OUT
    accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/own_trainer.py BASE DATA OUT

BASE is a model folder or hub id, DATA a file of JSON lines with `prompt` and `completion`. OUT/adapter is the trained
adapter; `pat merge --adapter OUT/adapter --output_dir OUT/model` makes the small model of it, in one process.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from pat import PatCallback, PatConfig


def main(base: str, data: str, out: str, **more: Any) -> SFTTrainer:
    """Train an adapter on a base and save it; `more` are arguments of the trainer."""
    arguments = SFTConfig(
        output_dir=f"{out}/checkpoints",
        learning_rate=1e-3,
        max_length=512,
        per_device_train_batch_size=4,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to="none",
        **more,
    )
    # The base is loaded whole in every process; FSDP2 shards it when training begins.
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = PatConfig(task_type="CAUSAL_LM", pruning_ratio=0.25, milestone=1 / 3)
    trainer = SFTTrainer(
        model=get_peft_model(model, config),
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[PatCallback()],
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")  # every process has to call it, the first one writes
    return trainer


if __name__ == "__main__":
    given = dict(flag.split("=", 1) for flag in sys.argv[4:])  # such as max_steps=100
    words = {"true": True, "false": False}
    main(*sys.argv[1:4], **{k: int(v) if v.isdigit() else words.get(v, v) for k, v in given.items()})
