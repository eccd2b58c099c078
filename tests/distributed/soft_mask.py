"""A script of one's own whose mask is soft for five of six steps, so that the regularisers act: BASE DATA OUT."""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from pat import PatCallback, PatConfig


def main(base: str, data: str, out: str, *flags: str) -> None:
    """Train and save an adapter."""
    arguments = SFTConfig(
        output_dir=f"{out}/checkpoints",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        adam_epsilon=1e-3,
        gradient_checkpointing=False,
        bf16="--bf16" in flags,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = PatConfig(task_type="CAUSAL_LM", pruning_ratio=0.25, axes=["hidden", "mlp"], milestone=0.8)
    trainer = SFTTrainer(
        model=get_peft_model(model, config),
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[PatCallback()],
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")
    print(f"{trainer.accelerator.num_processes} processes of {trainer.accelerator.distributed_type!s}")


if __name__ == "__main__":
    main(*sys.argv[1:])
