"""Trainers whose batches hold texts, or tokens under other names, calibrate from them and end with a smaller model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from tiny_models import build, tiny_tokenizer
from tiny_training import arguments, attach, largest_difference, logits, tuner_of

from pat.errors import PatError
from pat.training.callbacks.callback import PatCallback

disable_progress_bars()

PREFERENCES = [{"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": " no no"} for i in range(16)]
JUDGED = [{"prompt": f"say {i}", "completion": f" yes {i}", "label": i % 2 == 0} for i in range(16)]
TALKS = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(16)]


def grpo() -> tuple[Any, Any, Any]:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig, TALKS


def rloo() -> tuple[Any, Any, Any]:
    from trl import RLOOConfig, RLOOTrainer

    return RLOOTrainer, RLOOConfig, TALKS


def orpo() -> tuple[Any, Any, Any]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig, PREFERENCES


def cpo() -> tuple[Any, Any, Any]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer, CPOConfig, PREFERENCES


def kto() -> tuple[Any, Any, Any]:
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig, JUDGED


@pytest.mark.parametrize("kind", [grpo, rloo, orpo, cpo, kto])
def test_the_run_calibrates_from_its_own_texts_warns_and_merges(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_class, config_class, rows = kind()
    more: dict[str, Any] = {"max_steps": 2}
    if kind in (grpo, rloo):
        more |= {"num_generations": 4, "max_completion_length": 6}
    options: dict[str, Any] = {}
    if kind in (grpo, rloo):
        options["reward_funcs"] = lambda completions, **_: [float(index) for index, _ in enumerate(completions)]
    model = attach(build("llama", tied=True), rotation="pca", milestone=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            args=config_class(**arguments(tmp_path, **more)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            callbacks=[PatCallback()],
            **options,
        )
        trainer.train()
    mask = tuner_of(model).mask()
    assert mask.calibrated and mask.basis is not None and mask.hardened
    assert sum("starts with a soft mask" in message for message in caplog.messages) == 1
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    assert largest_difference(logits(model), logits(model.merge_and_unload())) <= 1e-4


def test_a_trainer_without_anything_to_read_says_what_to_do(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**arguments(tmp_path, remove_unused_columns=False))
    model = attach(build("llama", tied=True), rotation="pca")
    rows = Dataset.from_list([{"question": "a"}] * 8)
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=list, callbacks=[PatCallback()])
    with pytest.raises(PatError, match=r"'question'.*PatConfig\.calibration.*model\.calibrate.*rotation='none'"):
        trainer.train()
