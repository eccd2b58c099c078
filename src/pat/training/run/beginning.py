"""Writes into the folder of a run that begins to train which run this is, and what its base has scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pat import ranks
from pat.checkpoint.places import CHECKPOINTS, RUN_FILE
from pat.errors import PatError, RunFailed
from pat.training.run.base_scores import BASE_SCORES, BaseScores
from pat.training.run.run_file import RunFile


@contextmanager
def begun(folder: Path, run: RunFile, scores: BaseScores) -> Iterator[None]:
    """Write it; if the user's input turns out to be wrong, take back what was made until then.

    Args:
        folder: of the run.
        run: its description.
        scores: of its base.
    """
    checkpoints = folder / CHECKPOINTS

    def write() -> None:
        run.write(folder)
        scores.write(checkpoints, run)

    is_new = ranks.first(lambda: not (folder / RUN_FILE).exists())
    ranks.first_alone(write)
    try:
        yield
    except PatError as error:
        if not ranks.is_first():
            raise
        if is_new and not isinstance(error, RunFailed):
            (folder / RUN_FILE).unlink()
            (checkpoints / BASE_SCORES).unlink()
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        raise
