"""Looks through the checkpoints and the model that a run has left for files that are missing, torn or another run's."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pat.errors import PatError, one_line
from pat.kinds import misfits
from pat.loading.stored import stored_tensors

RANDOM_STATE = "rng_state.pth"

LATEST = "latest"
"""File of DeepSpeed's that names the folder of its parts; it is written when all of them are."""

INSTEAD = {
    RANDOM_STATE: (RANDOM_STATE, "rng_state_0.pth"),
    OPTIMIZER_NAME: (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, LATEST),
}
"""Further names of a file: each of several processes writes a random state of its own, FSDP2 and DeepSpeed their own
optimizer."""

_PARTS = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"

NEEDED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, RANDOM_STATE, TRAINER_STATE_NAME)
"""Files without which a training that goes on would not be the one that was cut off."""

_NUMBERS = {field.name for field in fields(TrainerState)} - {"log_history", "stateful_callbacks", "trial_params"}

_OF_THE_PLACE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
"""Keys of an adapter's configuration that say nothing about what it computes."""


def flaw(checkpoint: Path, needed: Collection[str] = NEEDED) -> str | None:
    """Return what is wrong with the files that a training goes on from; None if all open and those needed are there.

    The trainer writes into the folder's final place: one that was killed leaves a part of them, the last cut off.
    """
    for name in (*NEEDED, SCALER_NAME, LATEST):
        found = (checkpoint / other for other in INSTEAD.get(name, ()))
        path = next((path for path in found if path.is_file()), checkpoint / name)
        if not path.is_file():
            if name in needed:
                return f"it has no {name}"
            continue
        if path.name == LATEST != name:
            continue  # it has its own turn, also where it stands beside the optimizer of another engine
        try:
            if name == LATEST:
                _open_parts(path)
                continue
            content = _open(path)
            wrong = _flaw_of_state(content, checkpoint.name) if name == TRAINER_STATE_NAME else None
        except Exception as error:  # of many kinds, which each format has for itself
            wrong = f"is not readable ({one_line(error)})"
        if wrong is not None:
            return f"its {path.name} {wrong}"
    return None


def other_adapter(checkpoint: Path, adapter: Path) -> str | None:
    """Return what a checkpoint's adapter is otherwise than the run's; None if nothing, or if the run's is not known.

    Args:
        checkpoint: folder of it, whose files open.
        adapter: folder of the run's adapter.
    """
    try:
        ours = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
        names = sorted(ours.keys() - _OF_THE_PLACE)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    stored = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    if not isinstance(stored, dict):
        return f"its {CONFIG_NAME} is no mapping"
    # Another version of peft knows other keys.
    name = next((name for name in names if name in stored and _plain(stored[name]) != _plain(ours[name])), None)
    return name and f"its {CONFIG_NAME} has {name}={stored[name]!r:.100}, and the run's adapter {ours[name]!r:.100}"


def model_flaw(folder: Path) -> str | None:
    """Return what is wrong with the files of a written model, whose weights are not read; None if all are whole."""
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    for path in sorted(folder.glob("*.json")):
        try:
            _open(path)
        except (OSError, ValueError, RecursionError) as error:
            return f"its {path.name} is not readable ({one_line(error)})"
    try:
        return None if stored_tensors(str(folder)) else "it has no weights"
    except PatError as error:
        return str(error).rstrip(".")


def num_parts(checkpoint: Path) -> int | None:
    """Return how many processes have written a part of a checkpoint; None if DeepSpeed has not written it."""
    return len(list(parts_folder(checkpoint).glob(_PARTS))) if (checkpoint / LATEST).is_file() else None


def parts_folder(checkpoint: Path) -> Path:
    """Return the folder of the processes' parts in a checkpoint that DeepSpeed has written.

    Raises:
        ValueError: its name is none that DeepSpeed gives; DeepSpeed itself would follow any path.
    """
    name = (checkpoint / LATEST).read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"global_step\d+", name):
        raise ValueError(f"names {name!r:.100} instead of a folder of DeepSpeed's")
    return checkpoint / name


def _open_parts(latest: Path) -> None:
    """Raise an error, of any kind, if a file that DeepSpeed goes on from is missing or not whole; unpickle none."""
    folder = parts_folder(latest.parent)
    parts = sorted(folder.glob(_PARTS))
    held = sorted(int(re.findall(r"zero_pp_rank_(\d+)_", part.name)[0]) for part in parts)
    states = len(list(latest.parent.glob("rng_state*.pth")))
    if not held or held != list(range(max(states, 1))):
        raise ValueError(f"{folder.name} has parts of the processes {held}, of {states}")
    for path in (*parts, folder / "mp_rank_00_model_states.pt"):
        try:
            _open(path)
        except Exception as error:  # of many kinds, none of which names the file
            raise ValueError(f"{path.name}: {one_line(error)}") from error


def _open(path: Path) -> Any:
    """Raise an error, of any kind, if a file is not whole; return what it holds if it is JSON."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares the size of the file with what its header says
            return None
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise ValueError(f"{member} has another checksum")
    return None


def _flaw_of_state(state: Any, folder: str) -> str | None:
    """Return what is wrong with the state of a trainer, among others that it is of another step than the folder."""
    if not isinstance(state, dict):
        return "is no mapping"
    if (wrong := misfits({name: state[name] for name in _NUMBERS & state.keys()}, TrainerState)) is not None:
        return f"cannot be used ({wrong})"
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(row, Mapping) for row in history):
        return "cannot be used (its log_history is no list of mappings)"
    TrainerState(**state)  # knows all of its keys
    step = state.get("global_step")
    if not isinstance(step, int) or step < 0:
        return f"cannot be used (got global_step={step!r:.100}; expected a whole number)"
    number = folder.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    if number != folder and number.isdigit() and int(number) != step:
        return f"is that of step {step}"
    return None


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value  # peft has sets, which have no order
