"""Says what an interruption has left of a run that does not train at the moment, and so saves nothing any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pat.checkpoint.places import CHECKPOINTS, RESULTS, STAGE_TWO
from pat.training.run.base_scores import BASE_SCORES
from pat.training.run.checkpoints import numbered_checkpoints
from pat.training.run.trained import TRAINING, last_adapter


@contextmanager
def telling_what_is_kept(folder: Path) -> Iterator[None]:
    """Put what the same command begins with into a KeyboardInterrupt, which stays one.

    Args:
        folder: of the run.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (what_is_kept(folder),)
        raise


def what_is_kept(folder: Path) -> str:
    """Say what the same command begins with after an interruption."""
    places = (folder / CHECKPOINTS, folder / CHECKPOINTS / STAGE_TWO)
    is_trained = (folder / RESULTS).exists() or (last_adapter(folder) / TRAINING).exists()
    if is_trained or any(numbered_checkpoints(place) for place in places):
        return "the same command goes on from what is finished"
    if (folder / CHECKPOINTS / BASE_SCORES).exists():
        return "no step is kept yet: the same command begins anew, with what the base has scored"
    return "nothing is kept yet: the same command begins anew"
