"""The folder of a run: kept from other runs, and read for where the same command goes on."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from pat.checkpoint.places import ADAPTER, CHECKPOINTS, COMPACT, MODEL, NAMES, RECORD, RESULTS, RUN_FILE, STAGE_TWO
from pat.checkpoint.staging import check_output_folder, discard, lock_folder, remove_unfinished
from pat.errors import PatError
from pat.paths import is_inside, near
from pat.training.arguments import TuneArguments
from pat.training.outcome.results import TuneRecord
from pat.training.run.checkpoints import (
    check_taken_over,
    is_compact,
    last_checkpoint,
    numbered_checkpoints,
    remove_later,
)
from pat.training.run.run_file import RunFile
from pat.training.run.trained import TRAINING, training_facts
from pat.training.run.unwritten import writing_failed
from pat.training.run.whole import flaw, model_flaw
from pat.whole_files import STAGED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: str | None = None
    is_trained: bool = False
    """Whether training is over, and only the merge or its figures are missing."""

    def phases(self, run: RunFile) -> RunFile:
        """Return the description of a run with those phases finished that this start takes over."""
        if self.is_trained:
            return run.only("stage_one", "compaction", "stage_two", "model")
        return run.only("stage_one", "compaction") if self.checkpoint else run.only()


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if need be; if nothing comes of it, it goes again.

    Raises:
        PatError: another run holds it, or it cannot be made.
        RunFailed: a file in it could not be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock: int | None = None
    try:
        try:
            lock = _hold(folder)
        except BlockingIOError as error:
            raise PatError(f"{folder}: another run is writing there; wait for it, or choose another folder.") from error
        except OSError as error:
            raise PatError(f"{folder}: cannot be written to ({error.strerror}); choose another folder.") from error
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (failure := writing_failed(error, folder)) is None:
            raise
        raise failure from error
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if lock is not None:
            os.close(lock)


def check_folder(arguments: TuneArguments) -> str | None:
    """Check that a run may write into its folder, and return the checkpoint that it is told to go on from.

    Raises:
        PatError: there is no such checkpoint, it is torn, or the folder holds what is not a run's.
    """
    folder = arguments.output_dir
    named = _named(arguments)
    run = RunFile.read(folder)
    if arguments.run.overwrite:
        _check_overwritten(arguments, run)
    elif run is None and _has_checkpoints(folder):
        if not named:
            raise PatError(
                f"{folder}: holds checkpoints of a run, but no {RUN_FILE} that tells which; go on with the last one by "
                "--resume_from_checkpoint true, or choose another output folder."
            )
        check_output_folder(folder / MODEL)
    elif run is None and named is True:
        raise PatError(
            f"Got resume_from_checkpoint=true, but there is no checkpoint in {folder / CHECKPOINTS}; leave the flag "
            "out to start anew."
        )
    elif run is None and isinstance(named, str):
        check_output_folder(folder / MODEL)
    elif run is None and not _is_a_beginning(folder):
        check_output_folder(folder)
    if isinstance(named, str) and (found := flaw(Path(named), needed=(SAFETENSORS_WEIGHTS_NAME,))) is not None:
        raise PatError(f"Got resume_from_checkpoint={named}, but {found}{near(named, folder=True)}; name another one.")
    if named is True and run is None and not arguments.run.overwrite:
        named = last_checkpoint(folder / CHECKPOINTS)
        if named is None:
            raise PatError(f"{folder / CHECKPOINTS}: no checkpoint there is whole; choose another output folder.")
    return named if isinstance(named, str) else None


def find_finished(arguments: TuneArguments, named: str | None) -> TuneRecord | None:
    """Return the record of the run in the folder if it is finished, as long as it was asked to be.

    Raises:
        PatError: it is finished, but something else is asked of it.
    """
    folder, sft = arguments.output_dir, arguments.sft
    record = TuneRecord.read(folder / RESULTS)
    if arguments.run.overwrite or record is None:
        return None
    if (found := model_flaw(folder / MODEL)) is not None:
        if (folder / MODEL).is_dir():
            logger.warning("%s: the run there was finished, but its model is not whole: %s.", folder, found)
        return None
    asked = {"max_steps": sft.max_steps, "num_train_epochs": sft.num_train_epochs}
    had = {name: record.training_arguments.get(name) for name in asked}
    other = [f"{name}: {had[name]} in the run, {value} given" for name, value in asked.items() if had[name] != value]
    if is_inside(named, folder):
        other.append(f"resume_from_checkpoint={named} given")
    if other:
        raise PatError(
            f"{folder}: the run there is finished, and another one is asked for ({'; '.join(other)}); choose another "
            "output folder, or start anew with --overwrite true."
        )
    return record


def find_start(arguments: TuneArguments, named: str | None, num_steps: int) -> Start:
    """Return where a run begins, of which the folder may hold a part already.

    A checkpoint of the folder is gone back to if it is named. One from elsewhere is where the run begins, until the run
    has checkpoints of its own.

    Raises:
        PatError: the folder holds a model, and nothing that it and its figures could be made of; or something is
            missing of what the run goes on with.
    """
    folder, run = arguments.output_dir, RunFile.read(arguments.output_dir)
    if arguments.run.overwrite or run is None or is_inside(named, folder):
        start = Start(named)
    elif training_facts(folder, num_steps, no_compact=arguments.run.no_compact) is not None:
        start = Start(is_trained=True)
    else:
        has_compact = (folder / COMPACT / RECORD).is_file()
        own = last_checkpoint(folder / CHECKPOINTS, of_stage_two=has_compact)
        if (folder / MODEL).exists() and own is None:
            raise PatError(
                f"{folder}: holds a model, but lacks its figures or some of its files, and the adapter and checkpoints "
                "that they could be made of; choose another output folder, or start anew with --overwrite true."
            )
        start = Start(own or named)
    is_small = start.checkpoint is not None and is_compact(start.checkpoint) and not arguments.run.no_compact
    if start.is_trained or is_small:
        check_taken_over(folder, is_trained=start.is_trained)
    return start


def sweep(folder: Path) -> None:
    """Remove what was left half-written in a run's folder, by whomever: a process that was killed, or a full disk."""
    checkpoints = folder / CHECKPOINTS
    for place in (folder, folder / COMPACT, checkpoints, checkpoints / STAGE_TWO):
        remove_unfinished(place, NAMES if place == folder else None)


def clear(arguments: TuneArguments, start: Start) -> None:
    """Say where a run begins, if the folder holds a part of it, and remove from there what is not taken over."""
    folder, checkpoints = arguments.output_dir, arguments.output_dir / CHECKPOINTS
    is_known = RunFile.read(folder) is not None
    sweep(folder)
    if start.is_trained:
        _say(f"{folder}: the model is trained; going on with what is missing of the merge and the figures.")
        return
    for adapter in (folder / ADAPTER, folder / COMPACT / ADAPTER):
        (adapter / TRAINING).unlink(missing_ok=True)
    if is_inside(start.checkpoint, folder):
        checkpoint = Path(os.path.realpath(str(start.checkpoint)))
        _say(f"{folder}: going on from {checkpoint.relative_to(os.path.realpath(folder))}.")
        remove_later(Path(os.path.realpath(checkpoints)), checkpoint)
    elif is_known:
        if arguments.run.overwrite:
            _say(f"{folder}: the run starts anew, and what there was of it is removed.")
        else:
            _say(f"{folder}: no whole checkpoint is there, so that training begins anew.")
        discard(checkpoints)
    if is_known:
        # What belongs to a checkpoint from elsewhere stays.
        for name in (MODEL, RESULTS) if start.checkpoint is not None else NAMES:
            discard(folder / name)
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)


def _hold(folder: Path) -> int | None:
    """Make a folder and lock it; if who made it empty-handed removes it meanwhile, make it again."""
    while True:
        if folder.exists() and not folder.is_dir():
            check_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock = lock_folder(folder)
        if lock is None or (folder.is_dir() and os.path.samestat(os.fstat(lock), folder.stat())):
            return lock
        os.close(lock)


def _named(arguments: TuneArguments) -> str | bool | None:
    """Return the checkpoint that a flag names, or whether it says that there is to be one.

    Raises:
        PatError: there is nothing at the path.
    """
    given: Any = arguments.sft.resume_from_checkpoint  # a path, or a word for true or false
    if isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    if not isinstance(given, str):
        return bool(given)
    if not os.path.isdir(given):
        raise PatError(
            f"Got resume_from_checkpoint={given}, but there is no checkpoint at that path; leave the flag out, and the "
            "run goes on from its last one."
        )
    return given


def _check_overwritten(arguments: TuneArguments, run: RunFile | None) -> None:
    """Check that --overwrite removes nothing but what a run has written, and nothing that this one reads.

    Raises:
        PatError: it would.
    """
    folder = arguments.output_dir
    if run is None and not _is_a_beginning(folder):
        raise PatError(
            f"{folder}: got --overwrite true, but there is no {RUN_FILE}, and so no run of `pat tune`; choose another "
            "output folder, or empty it first."
        )
    ours = {path.name for path in _beginnings(folder)} | set(NAMES)
    if run is not None and (foreign := sorted({path.name for path in folder.iterdir()} - ours)):
        raise PatError(
            f"{folder}: got --overwrite true, but {foreign[0]} is not from `pat tune`; move it away, or choose another "
            "output folder."
        )
    read = [
        ("model_name_or_path", arguments.run.model_name_or_path),
        *(("dataset_name", name) for name in arguments.run.dataset_names),
        ("held_out", arguments.run.held_out),
        ("teacher", arguments.distill.teacher),
        ("resume_from_checkpoint", arguments.sft.resume_from_checkpoint),
    ]
    for name, value in read:
        if isinstance(value, str) and Path(value).exists() and is_inside(value, folder):
            raise PatError(f"Got --overwrite true and {name}={value}, which it would remove; move it away first.")


def _is_a_beginning(folder: Path) -> bool:
    """Tell whether a folder holds no more than what a run leaves that was cut off before it had begun to train."""
    return not folder.is_dir() or len(_beginnings(folder)) == len(list(folder.iterdir()))


def _beginnings(folder: Path) -> list[Path]:
    """Return what a run has begun to write into its folder, or to remove from it, but not finished."""
    if not folder.is_dir():
        return []
    empty = [path for path in (folder / CHECKPOINTS,) if path.is_dir() and not any(path.iterdir())]
    return [*empty, *(path for name in NAMES for path in folder.glob(f".{name}{STAGED}*"))]


def _has_checkpoints(folder: Path) -> bool:
    return any(numbered_checkpoints(place) for place in (folder / CHECKPOINTS, folder / CHECKPOINTS / STAGE_TWO))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
