"""A checkpoint resumed at any step gives the same losses, to the last bit, as the run that was never interrupted.

Here with all that has a random state or a state of its own: dropout, shuffled epochs, accumulation, decay. Every family
is resumed in `test_families`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import shallow
from tiny_training import attach, logits, losses, train, tuner_of
from transformers import Trainer, TrainerCallback

from pat.tuner import PatModel

STEPS, MILESTONE = 5, 3
"""Checkpoints one and two lie before the milestone, three at it, four after it."""

CASES: dict[str, dict[str, Any]] = {
    "rotated": {"rotation": "pca", "lora_dropout": 0.1},
    "importance": {"family": "gemma3_text", "rotation": "auto", "lora_dropout": 0.1},
    "saved": {"tied": False, "rotation": "pca", "use_dora": True, "modules_to_save": ["norm", "lm_head"]},
}

TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "num_examples": 12,  # three steps an epoch: the second one is shuffled anew
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
}


class Masks(TrainerCallback):  # type: ignore[misc]
    """Keeps the gate's values after every step."""

    def __init__(self) -> None:
        self.gates: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gates.append(tuner_of(kwargs["model"]).mask().values().detach().clone())


@dataclass
class Run:
    fields: dict[str, Any]
    folder: Path
    losses: list[float]
    gates: list[torch.Tensor]
    logits: torch.Tensor

    def attach(self) -> PeftModel:
        fields = dict(self.fields)
        base = shallow(fields.pop("family", "llama"), tied=fields.pop("tied", True))
        return attach(base, milestone=MILESTONE / STEPS, **fields)

    def train(self, **more: Any) -> tuple[Trainer, Masks, PeftModel]:
        masks, model = Masks(), self.attach()
        return train(model, callbacks=[masks], **(TRAINING | more)), masks, model


@pytest.fixture(scope="module", params=CASES, ids=str)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = Run(CASES[request.param], tmp_path_factory.mktemp(request.param), [], [], torch.empty(0))
    torch.manual_seed(0)
    trainer, masks, model = run.train(output_dir=run.folder)
    run.losses, run.gates, run.logits = losses(trainer), masks.gates, logits(model)
    assert len(run.losses) == STEPS and len(set(run.losses)) == STEPS
    yield run


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every calibration."""
    made: list[int] = []
    original = PatModel.calibrate

    def counting(self: PatModel, *args: Any, **kwargs: Any) -> Any:
        made.append(self.mask().step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PatModel, "calibrate", counting)
    return made


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_resumed_run_is_the_uninterrupted_one(
    uninterrupted: Run, step: int, tmp_path: Path, calibrations: list[int]
) -> None:
    torch.manual_seed(1000 + step)  # neither the adapter's new initial values nor the random state may matter
    trainer, masks, model = uninterrupted.train(
        output_dir=tmp_path, resume_from=uninterrupted.folder / f"checkpoint-{step}"
    )
    resumed = losses(trainer)
    assert len(resumed) == STEPS  # the state brings the losses before the checkpoint along
    assert [a - b for a, b in zip(resumed, uninterrupted.losses, strict=True)] == [0.0] * STEPS
    assert len(masks.gates) == STEPS - step
    for mine, theirs in zip(masks.gates, uninterrupted.gates[step:], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(logits(model), uninterrupted.logits)
    assert not calibrations
    model.merge_and_unload()
