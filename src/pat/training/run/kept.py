"""Says what an interruption has left of a run that does not train at the moment, and so saves nothing any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pat.checkpoint.places import CHECKPOINTS, RESULTS, STAGE_TWO
from pat.training.arguments import TuneArguments
from pat.training.run.base_scores import BASE_SCORES
from pat.training.run.checkpoints import numbered_checkpoints
from pat.training.run.trained import TRAINING, last_adapter
from pat.training.run.whole import flaw


@contextmanager
def telling_what_is_kept(arguments: TuneArguments) -> Iterator[None]:
    """Put what the same command begins with into a KeyboardInterrupt, which stays one.

    Args:
        arguments: of the run.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (what_is_kept(arguments),)
        raise


def what_is_kept(arguments: TuneArguments) -> str:
    """Say what the same command begins with after an interruption."""
    folder, again = arguments.output_dir, arguments.run.same_command
    places = (folder / CHECKPOINTS, folder / CHECKPOINTS / STAGE_TWO)
    is_trained = (folder / RESULTS).exists() or (last_adapter(folder) / TRAINING).exists()
    if is_trained or any(flaw(path) is None for place in places for path in numbered_checkpoints(place).values()):
        return f"{again} goes on from what is finished"
    if isinstance(named := arguments.sft.resume_from_checkpoint, str) and os.path.isdir(named):
        return f"no step is kept yet: the same command begins at {named} again"
    if (folder / CHECKPOINTS / BASE_SCORES).exists():
        return f"no step is kept yet: {again} begins anew, with what the base has scored"
    return "nothing is kept yet: the same command begins anew"
