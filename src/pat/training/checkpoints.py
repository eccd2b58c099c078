"""The checkpoints of a run: which of them to go on from, and how the second stage goes on from the first."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pat.checkpoint.staging import discard, staged_folder
from pat.errors import PatError, one_line
from pat.training.handover import cut_states, read_states, write_states
from pat.training.sittings import write_seconds
from pat.tuner.compaction import CompactModel
from pat.tuner.model import PatModel

logger = logging.getLogger(__name__)

STAGE_TWO = "compact"
"""Folder of stage two below the checkpoints, so that a resumed run finds the stage it was in."""

RANDOM_STATE = "rng_state.pth"

INSTEAD = {RANDOM_STATE: (RANDOM_STATE, "rng_state_0.pth"), OPTIMIZER_NAME: (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)}
"""What a file is called elsewhere: each of several processes has a random state, FSDP2 a file of another form."""

NEEDED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, RANDOM_STATE, TRAINER_STATE_NAME)
"""Files without which a training that goes on would not be the one that was cut off."""


def is_compact(checkpoint: str) -> bool:
    """Tell whether a checkpoint is one of stage two: an ordinary LoRA adapter.

    Raises:
        PatError: it is not readable.
    """
    path = Path(checkpoint) / CONFIG_NAME
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("peft_type") == PeftType.LORA.value
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise PatError(f"{path}: not readable as JSON; resume from another checkpoint.") from error


def last_checkpoint(checkpoints: Path, *, of_stage_two: bool = True) -> str | None:
    """Return the last whole checkpoint of a run, of stage two if that has begun; later ones that are torn are named."""
    for folder in (checkpoints / STAGE_TWO, checkpoints) if of_stage_two else (checkpoints,):
        for _, path in sorted(numbered_checkpoints(folder).items(), reverse=True):
            if (found := flaw(path)) is None:
                return str(path)
            logger.warning("%s is passed over, because %s.", path, found)
    return None


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of one stage by their step, whole or not."""
    numbered = {path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): path for path in folder.glob("checkpoint-*")}
    return {int(number): path for number, path in numbered.items() if number.isdigit() and path.is_dir()}


def flaw(checkpoint: Path, needed: Collection[str] = NEEDED) -> str | None:
    """Return what is wrong with the files that a training goes on from; None if all open and those needed are there.

    The trainer writes into the folder's final place: one that was killed leaves a part of them, the last cut off.
    """
    for name in (*NEEDED, SCALER_NAME):
        found = (checkpoint / other for other in INSTEAD.get(name, ()))
        path = next((path for path in found if path.is_file()), checkpoint / name)
        if not path.is_file():
            if name in needed:
                return f"it has no {name}"
            continue
        try:
            _open(path)
        except Exception as error:  # of many kinds, which each format has for itself
            return f"its {name} is not readable ({one_line(error)})"
    return None


def remove_later(checkpoints: Path, checkpoint: Path) -> None:
    """Remove the checkpoints, whole or torn, of what a run will do again that goes on from one."""
    if checkpoint.parent != checkpoints / STAGE_TWO:
        discard(checkpoints / STAGE_TWO)
    numbered = numbered_checkpoints(checkpoint.parent)
    step = next((number for number, path in numbered.items() if path == checkpoint), 0)
    for number, path in numbered.items():
        if number > step:
            discard(path)


def _open(path: Path) -> None:
    """Raise an error, of any kind, if a file is not whole."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares the size of the file with what its header says
            pass
    else:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise ValueError(f"{member} has another checksum")


def load_hard(trainer: Trainer, tuner: PatModel, checkpoint: str) -> bool:
    """Load a checkpoint if its mask is hard already, as a run leaves it that was cut off between the stages.

    Raises:
        PatError: a file of the trainer's is missing.
    """
    model = cast(PeftModel, trainer.model)
    model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)
    if not tuner.mask().hardened:
        return False
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME):
        if not any((Path(checkpoint) / other).is_file() for other in INSTEAD.get(name, (name,))):
            raise PatError(
                f"{checkpoint}: has no {name}, so it cannot be gone on from; resume from another checkpoint."
            )
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return True


def load_finished(trainer: Trainer, checkpoint: str, num_steps: int) -> bool:
    """Load a checkpoint if it has all steps of the run already: resumed from it, a trainer would take one more."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = TrainerState.load_from_json(str(path)) if path.is_file() else None
    if state is None or state.global_step < num_steps:
        return False
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    model = cast(PeftModel, trainer.model)
    model.load_adapter(best or checkpoint, model.active_adapter, is_trainable=True)
    trainer.state = state
    return True


def continue_from(
    done: Path,
    trainer: Trainer,
    compact: CompactModel,
    masked: PeftModel,
    stage_two: Trainer,
    seconds: Mapping[str, float],
) -> Path:
    """Turn stage one's last checkpoint into one that stage two resumes from, in stage two's own folder.

    Moments of parameters that go on are cut like they are. New factors have none and start at their own step 0; with
    the old step count their first updates would be some three times too large.

    Args:
        done: the checkpoint.
        trainer: of stage one.
        compact: the small model.
        masked: what it was made of, whose parameters it has inherited: the model of stage one, or a copy.
        stage_two: trainer of the small model.
        seconds: that each part of the run has taken so far.
    """
    target = Path(cast(str, stage_two.args.output_dir)) / done.name
    state = json.loads((done / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    # Where the best checkpoint so far was one of the masked model, it cannot be loaded into the compact one.
    state |= {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
    old = {parameter: name for name, parameter in masked.named_parameters()}
    new = {parameter: name for name, parameter in compact.model.named_parameters()}
    cuts = {
        new[parameter]: (old[was.parameter], was.cut, was.parameter.shape)
        for parameter, was in compact.inherited.items()
    }
    states, groups = read_states(done, trainer)
    with staged_folder(target, replaces=True) as folder:
        for file in done.iterdir():  # schedule, random state, scaler
            if file.suffix in (".pt", ".pth") and file.name != OPTIMIZER_NAME:
                shutil.copy2(file, folder)
        assert (folder / SCHEDULER_NAME).is_file()
        compact.model.save_pretrained(str(folder))
        write_states(folder, stage_two, cut_states(states, cuts), groups)
        (folder / TRAINER_STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        write_seconds(folder, seconds)
    return target
