"""From the checkpoint that stage one ended with to the one that stage two resumes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from pat.tuner.compaction import CompactModel


def continue_from(done: Path, trainer: Trainer, compact: CompactModel, stage_two: Trainer) -> Path:
    """Turn stage one's last checkpoint into one that stage two resumes from, in stage two's own folder."""
    target = Path(cast(str, stage_two.args.output_dir)) / done.name
    folder = target.with_name(f".{target.name}.tmp")  # whole or not at all: a resumed run takes what it finds
    for leftover in (target, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in done.iterdir():  # schedule, random state, scaler
        if file.suffix in (".pt", ".pth") and file.name != OPTIMIZER_NAME:
            shutil.copy2(file, folder)
    assert (folder / SCHEDULER_NAME).is_file()
    state = json.loads((done / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    # Where the best checkpoint so far was one of the masked model, it cannot be loaded into the compact one.
    state |= {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
    compact.model.save_pretrained(str(folder))
    torch.save(_inherited_state(trainer, compact, stage_two), folder / OPTIMIZER_NAME)
    (folder / TRAINER_STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return folder.rename(target)


def _inherited_state(trainer: Trainer, compact: CompactModel, stage_two: Trainer) -> dict[str, Any]:
    """Return the optimizer state stage two starts with: the moments of parameters that go on, cut like they are.

    New factors have none and start at their own step 0; with the old step count their first updates would be some three
    times too large.
    """
    before = cast(torch.optim.Optimizer, trainer.optimizer)
    now = stage_two.create_optimizer()
    result: dict[str, Any] = now.state_dict()
    parameters = [parameter for group in now.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        old = compact.inherited.get(parameter)
        state = {} if old is None else before.state.get(old.parameter, {})
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
        # Optimizers with states of another shape (factored, quantised) start anew.
        if old is None or not state or any(value.shape != old.parameter.shape for value in tensors):
            continue
        result["state"][index] = {
            name: old.cut(value) if isinstance(value, torch.Tensor) and value.dim() > 0 else value
            for name, value in state.items()
        }
    groups = zip(result["param_groups"], before.state_dict()["param_groups"], strict=False)
    for group, old_group in groups:  # the learning rate as the schedule has left it
        group.update({name: value for name, value in old_group.items() if name != "params"})
    return result
