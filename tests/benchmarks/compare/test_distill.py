"""Learning from a teacher: the loss, and that the trainer normalises it as TRL's does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compare.distill import DistillingTrainer, distillation_loss
from datasets import Dataset
from tiny_models import build, tiny_tokenizer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from trl import SFTTrainer

from pat.training.arguments import build_arguments


def test_the_loss_is_a_mixture_of_cross_entropy_and_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator) for _ in range(2))
    targets = torch.tensor([0, 6, 2, 2, 5])
    divergence = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="sum")
    expected = 0.75 * cross_entropy(student, targets, reduction="sum") + 0.25 * divergence
    assert torch.allclose(distillation_loss(student, teacher, targets, 0.25), expected)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_student_that_is_its_teacher_has_trls_loss_times_one_minus_the_weight(tmp_path: Path, weight: float) -> None:
    rows = Dataset.from_list([{"prompt": f"say {i} ", "completion": "so " * (1 + i % 5)} for i in range(12)])
    losses = []
    for distils in (False, True):
        arguments = build_arguments(
            model_name_or_path="base",
            dataset_name="rows.jsonl",
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,  # rows of several lengths in a step
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model: Any = build("llama", tied=True)
        options: dict[str, Any] = {
            "model": model,
            "args": arguments.sft,
            "train_dataset": rows,
            "processing_class": tiny_tokenizer(),
        }
        if distils:
            trainer: SFTTrainer = DistillingTrainer(teacher=copy.deepcopy(model), weight=weight, **options)
        else:
            trainer = SFTTrainer(**options)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx((1 - weight) * losses[0], rel=1e-5)
