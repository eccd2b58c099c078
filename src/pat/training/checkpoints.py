"""The checkpoints of a run of two stages: where they are, and which of them to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.utils import CONFIG_NAME
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pat.checkpoint.staging import make_readable
from pat.errors import PatError
from pat.loading import TokenSetup

STAGE_TWO = "compact"
"""Folder of stage two below the checkpoints, so that a resumed run finds the stage it was in."""


def is_compact(checkpoint: str) -> bool:
    """Tell whether a checkpoint is one of stage two: an ordinary LoRA adapter.

    Raises:
        PatError: it is not readable.
    """
    path = Path(checkpoint) / CONFIG_NAME
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("peft_type") == PeftType.LORA.value
    except ValueError as error:
        raise PatError(f"{path}: not readable as JSON; resume from another checkpoint.") from error


class SaveTokens(TrainerCallback):
    """Writes what belongs to a run's tokens into every checkpoint; the trainer's own tokenizer has had to be padded."""

    def __init__(self, tokens: TokenSetup) -> None:
        self.tokens = tokens

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write tokenizer and generation config."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.tokens.save(folder)
        make_readable(folder)


def last_checkpoint(checkpoints: Path) -> str | None:
    """Return the last whole checkpoint of a run, of stage two if that has begun."""
    for folder in (checkpoints / STAGE_TWO, checkpoints):
        # The trainer writes its state last: a run that was killed meanwhile leaves a folder without it.
        whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
        numbered = {path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): path for path in whole}
        steps = {int(number): path for number, path in numbered.items() if number.isdigit()}
        if steps:
            return str(steps[max(steps)])
    return None
