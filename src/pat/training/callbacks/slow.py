"""Says that steps take several times as long as announced, as where other programs have begun to use the CPU."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from pat import ranks
from pat.training.preflight.estimate import RANGE, step_span
from pat.training.preflight.threads import chosen_by_user

logger = logging.getLogger(__name__)

SEVERAL = 3.0
"""Times the upper end of the announced range from which on a step is slow. A long batch takes up to twice the mean."""

IN_A_ROW = 3
"""Number of slow steps in a row that are spoken of: a single one may have waited for a disk, or compiled something."""

LEAST_SECONDS = 2.0
"""Shorter steps are not spoken of: a run of them is over before anybody has done something about it."""


class SlowSteps(TrainerCallback):
    """Warns once in a run of slow steps, and says what to do where there is something. It may go through both stages.

    How many threads train fastest is measured once, before the run. Load that begins later makes them wait for one
    another, which a person sees only as a run that takes many times as long as announced (docs/adr/0029).
    """

    def __init__(self, step_seconds: float, same_command: str = "the same command") -> None:
        """Make it.

        Args:
            step_seconds: that a step was reckoned to take, or 0 where nothing was announced.
            same_command: what goes on with the run.
        """
        self.step_seconds, self.same_command = step_seconds, same_command
        self._began: float | None = None
        self._slow: list[float] = []
        """Seconds of the last steps, as long as they are slow."""

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock; what is scored and saved between steps belongs to none."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count a slow step, and say so when there are enough of them."""
        if not self.step_seconds or self._began is None or len(self._slow) >= IN_A_ROW:
            return
        seconds = time.monotonic() - self._began
        if seconds < max(LEAST_SECONDS, SEVERAL * RANGE[1] * self.step_seconds):
            self._slow.clear()
            return
        self._slow.append(seconds)
        if len(self._slow) == IN_A_ROW:
            mean, device = sum(self._slow) / IN_A_ROW, str(args.device.type)
            logger.warning("%s", _remark(mean, self.step_seconds, device, self.same_command))


def _remark(seconds: float, announced: float, device: str, same_command: str) -> str:
    """Return what is said of steps that take so many seconds, where about so many were announced."""
    said = (
        f"The last {IN_A_ROW} steps took {seconds:,.0f} seconds each, where {step_span(announced)} "
        f"{'were' if announced * RANGE[1] >= 1 else 'was'} announced; other programs seem to use this "
        f"{'CPU' if device == 'cpu' else 'machine'}."
    )
    if device != "cpu" or ranks.num_processes() > 1 or torch.get_num_threads() < 2 or chosen_by_user():
        return said
    return (
        f"{said} The {torch.get_num_threads()} threads of this run then wait for one another: stop it with Ctrl-C, "
        f"which keeps a checkpoint, and give {same_command} with OMP_NUM_THREADS=1 in front, which goes on from there."
    )
