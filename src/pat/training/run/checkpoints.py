"""The checkpoints of a run: which of them to go on from, and how the second stage goes on from the first."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pat.checkpoint.compact import read_compaction
from pat.checkpoint.places import ADAPTER, CHECKPOINTS, COMPACT, MODEL, RECORD, STAGE_TWO
from pat.checkpoint.staging import discard, staged_folder
from pat.errors import PatError, one_line
from pat.training.engines.handover import cut_states, is_sharded, read_states, write_states
from pat.training.run.sittings import write_seconds
from pat.training.run.trained import last_adapter
from pat.training.run.whole import INSTEAD, flaw, model_flaw, other_adapter
from pat.tuner.compaction import CompactModel
from pat.tuner.config import PatConfig
from pat.tuner.model import PatModel

logger = logging.getLogger(__name__)


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
            found = flaw(path)
            if found is None and folder.name == STAGE_TWO:
                found = other_adapter(path, checkpoints.parent / COMPACT / ADAPTER)
            if found is None:
                return str(path)
            logger.warning("%s is passed over, because %s.", path, found)
    return None


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of one stage by their step, whole or not."""
    numbered = {path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): path for path in folder.glob("checkpoint-*")}
    return {int(number): path for number, path in numbered.items() if number.isdigit() and path.is_dir()}


def remove_later(checkpoints: Path, checkpoint: Path) -> None:
    """Remove the checkpoints, whole or torn, of what a run will do again that goes on from one."""
    if checkpoint.parent != checkpoints / STAGE_TWO:
        discard(checkpoints / STAGE_TWO)
    numbered = numbered_checkpoints(checkpoint.parent)
    step = next((number for number, path in numbered.items() if path == checkpoint), 0)
    for number, path in numbered.items():
        if number > step:
            discard(path)


def check_taken_over(output_dir: Path, *, is_trained: bool) -> None:
    """Check what a run that goes on with the small model takes of its folder, beside a checkpoint.

    Args:
        output_dir: the run's folder.
        is_trained: whether training is over, so that the last adapter is taken as well.

    Raises:
        PatError: something is missing or not whole.
    """
    found = {}
    if not is_trained or (output_dir / COMPACT / RECORD).is_file():
        read_compaction(output_dir / COMPACT)
        found[output_dir / COMPACT / MODEL] = model_flaw(output_dir / COMPACT / MODEL)
        found[output_dir / ADAPTER] = _flaw_of_config(output_dir / ADAPTER)
    if is_trained:
        adapter = last_adapter(output_dir)
        found[adapter] = flaw(adapter, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    for place, wrong in found.items():
        if wrong is not None:
            last = last_checkpoint(output_dir / CHECKPOINTS, of_stage_two=False)
            back = f"go back to the first stage by --resume_from_checkpoint {last}, " if last else ""
            raise PatError(
                f"{place}: the run goes on with it, but {wrong}; put it back, {back}or start anew with --overwrite "
                "true."
            )


def _flaw_of_config(adapter: Path) -> str | None:
    """Return what is wrong with the configuration of the milestone's adapter, which belongs to the run's record."""
    if not (adapter / CONFIG_NAME).is_file():
        return f"it has no {CONFIG_NAME}"
    try:
        PatConfig.from_pretrained(str(adapter))
    except (TypeError, ValueError, AttributeError, KeyError, OSError, RecursionError) as error:
        return f"its {CONFIG_NAME} is not usable ({one_line(error)})"
    return None


@contextmanager
def taken_from(checkpoint: str | Path) -> Iterator[None]:
    """Turn what torch and peft say of a checkpoint that opens, but is not one of this training, into one line.

    Raises:
        PatError: it is none.
    """
    try:
        yield
    except (PatError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        mismatches = str(error).count("size mismatch for")
        detail = f"{mismatches} of its tensors have other shapes" if mismatches else one_line(error)
        raise PatError(
            f"{checkpoint}: is not of this training ({detail}); remove or replace that folder, and the same command "
            "goes on from the checkpoint before it, or start anew with --overwrite true."
        ) from error


def check_fit(trainer: Trainer, checkpoint: Path) -> None:
    """Check that a checkpoint's adapter and optimizer are those of a trainer that is about to go on from it.

    Raises:
        PatError: they are of another training.
    """
    if is_sharded(trainer):
        return  # whose files were made of a whole model's, or are opened by FSDP alone
    model = cast(PeftModel, trainer.model)
    with taken_from(checkpoint):
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        if (checkpoint / OPTIMIZER_NAME).is_file():
            stored = torch.load(checkpoint / OPTIMIZER_NAME, weights_only=True, map_location="cpu")["param_groups"]
            ours = trainer.create_optimizer().param_groups
            sizes, expected = ([len(group["params"]) for group in groups] for groups in (stored, ours))
            if sizes != expected:
                raise ValueError(f"its {OPTIMIZER_NAME} has groups of {sizes} parameters, and this one of {expected}")


def load_hard(trainer: Trainer, tuner: PatModel, checkpoint: str) -> bool:
    """Load a checkpoint if its mask is hard already, as a run leaves it that was cut off between the stages.

    Raises:
        PatError: a file of the trainer's is missing, or the adapter is of another training.
    """
    model = cast(PeftModel, trainer.model)
    with taken_from(checkpoint):
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
    with taken_from(best or checkpoint):
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
