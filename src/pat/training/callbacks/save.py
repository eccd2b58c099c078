"""Saves a checkpoint every few minutes, where nothing is asked for: how long a step takes is known only meanwhile."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from pat import ranks
from pat.training.arguments import TuneArguments

SECONDS_BETWEEN = 180.0
"""Seconds after the last checkpoint, or the beginning of the run, from which on a step ends with one."""

SHARE = 0.05
"""Share of the time that saving may take: where a checkpoint is large, or the disk slow, there are fewer."""

NUM_KEPT = 2
"""Checkpoints of a stage that stay on the disk, so that one that is torn leaves the one before it."""

_ASKED = frozenset({"save_steps", "save_strategy", "save_only_model", "load_best_model_at_end"})


class SaveByTime(TrainerCallback):
    """Has a trainer save at the end of a step when the last checkpoint is some minutes old.

    It comes after the callbacks that write into a checkpoint, so that what they take counts as well. When a step saves
    changes nothing else in it: whatever a run goes on from, its steps are the same.
    """

    def __init__(self) -> None:
        self._saved = self._ready = time.monotonic()
        self._seconds = 0.0
        """Seconds that the last checkpoint took."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save if it is time, in all processes if in one of them."""
        self._ready = time.monotonic()
        is_due = self._ready - self._saved >= max(SECONDS_BETWEEN, self._seconds / SHARE)
        if ranks.largest(int(is_due)):
            control.should_save = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that what follows is no scoring."""
        self._ready = time.monotonic()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when, and how long it took."""
        self._saved = time.monotonic()
        self._seconds = self._saved - self._ready


def saving(arguments: TuneArguments) -> list[TrainerCallback]:
    """Return what saves by time, if nothing says when to save; the trainer's own every 500 steps comes on top.

    Without `save_total_limit` no more than `NUM_KEPT` checkpoints of a stage are kept. Where they are to stay after the
    run, by `keep_checkpoints`, all of them are, and there are none by time, which would be many.
    """
    sft, given = arguments.sft, arguments.given
    if given & _ASKED or arguments.run.keep_checkpoints:
        return []
    if "save_total_limit" not in given:
        sft.save_total_limit = NUM_KEPT
    return [SaveByTime()]
