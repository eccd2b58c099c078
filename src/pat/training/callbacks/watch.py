"""What is seen of a training while it runs: the step, the loss, what the gates have left, and the time to go."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from pat.report.progress import Phase, clock, during, is_drawn
from pat.shape import AXES
from pat.training.callbacks.callback import LOGGED
from pat.training.preflight.threads import chosen_by_user

logger = logging.getLogger(__name__)

SECONDS_WITHOUT_A_LINE = 30
"""Seconds after which a step's end is told of where there is no live line, if the trainer has logged nothing."""

NUM_LATELY = 16
"""Steps by whose time the time to go is reckoned: those before a slow spell, or in one that is over, say little."""

MUCH_SLOWER = 4.0
"""How many times as long as announced a step has to take to be spoken of; an announcement may be off by half."""

NUM_SLOW = 3
"""Steps in a row that have to be so slow: one that is may have waited for something once."""


class SlowSteps:
    """Warns once in a run, if several steps in a row take much longer than was announced.

    Args:
        announced: seconds of a step; 0 where none were announced.
    """

    def __init__(self, announced: float = 0.0) -> None:
        self.announced = announced
        self._num_in_a_row = 0
        self._has_warned = False

    def note(self, seconds: float, args: Any) -> None:
        """Take down how long a step has taken, in seconds, of a training with the trainer's arguments `args`."""
        is_slow = self.announced > 0 and seconds > max(1.0, MUCH_SLOWER * self.announced)
        self._num_in_a_row = self._num_in_a_row + 1 if is_slow else 0
        if self._num_in_a_row < NUM_SLOW or self._has_warned:
            return
        self._has_warned = True
        remedy = ""
        if waits_for_threads(args):
            remedy = (
                f" The {torch.get_num_threads()} threads of this run wait for one another then: stop it with Ctrl-C, "
                "which keeps a checkpoint, and give the same command with OMP_NUM_THREADS=1 before it."
            )
        logger.warning(
            "Steps take %s seconds, and about %s were announced: something else seems to use this machine.%s",
            f"{seconds:,.3g}",
            f"{self.announced:,.2g}",
            remedy,
        )


def waits_for_threads(args: Any) -> bool:
    """Tell whether fewer threads may help a training with these arguments, whose number the user has not chosen."""
    return args.device.type == "cpu" and args.world_size == 1 and torch.get_num_threads() > 1 and not chosen_by_user()


class Watch(TrainerCallback):
    """Shows one training on the live line or, where there is none, in a line for each log and at least twice a minute.

    Without a live line a step has at most one line, which has only the figures of that step: where the step is logged,
    or held-out rows are scored after it, the line waits for them.

    It takes the place of the trainer's own bar and printer, and has to come after `PatCallback`, which puts the number
    of active channels into the logs.
    """

    def __init__(self, title: str, slow_steps: SlowSteps | None = None) -> None:
        self._seen = _Training(title)
        self._slow_steps = slow_steps or SlowSteps()
        self._step_began = 0.0
        self._said = time.monotonic()

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Show the training while the context is open."""
        trainer.add_callback(self)
        with during(self._seen):
            yield

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock at the first step; what is measured before it belongs to no step."""
        self._seen.begin(state)
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the step; a trainer that logs seldom does not look as if it hung."""
        self._seen.end(state)
        self._slow_steps.note(time.monotonic() - self._step_began, args)
        if not (control.should_log or control.should_evaluate):
            self._say_seldom(state)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell that rows are scored now."""
        self._seen.num_scored += 1
        self._say_seldom(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the figures, and print them where there is no live line."""
        logs = kwargs.get("logs") or {}
        self._seen.note(logs)
        if "eval_loss" in logs or ("loss" in logs and not control.should_evaluate):
            self._say(state)

    def _say_seldom(self, state: TrainerState) -> None:
        if time.monotonic() - self._said > SECONDS_WITHOUT_A_LINE:
            self._say(state)

    def _say(self, state: TrainerState) -> None:
        self._said = time.monotonic()
        if state.is_world_process_zero and not is_drawn():
            print(self._seen.line(), file=sys.stderr, flush=True)


def silence(trainer: Trainer) -> None:
    """Take the trainer's own printer away, which it has where its arguments disable the bar."""
    trainer.remove_callback(PrinterCallback)


class _Training(Phase):
    """A training, in words."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self.step = self.num_scored = self._last = 0
        self._ends: deque[float] = deque(maxlen=NUM_LATELY + 1)
        """Times at which the last steps have ended; before them, when the first one began."""
        self._left: tuple[float, float] | None = None
        """Seconds that were left at a time."""
        self._figures: dict[str, str] = {}
        self._noted: dict[str, int] = {}
        """The step at whose end each figure was logged."""

    def begin(self, state: TrainerState) -> None:
        """Begin a step."""
        self.num_scored = 0
        self._last = state.max_steps
        if not self._ends:
            self.step = state.global_step
            self._ends.append(time.monotonic())

    def end(self, state: TrainerState) -> None:
        """End a step."""
        self.step, now = state.global_step, time.monotonic()
        if self._ends:
            self._ends.append(now)
            self._left = now, (now - self._ends[0]) / (len(self._ends) - 1) * (self._last - self.step)

    def note(self, logs: dict[str, Any]) -> None:
        """Note what is shown of a trainer's logs."""
        self.num_scored = 0
        found: dict[str, str] = {}
        if "loss" in logs:
            found["loss"] = f"loss {float(logs['loss']):.3f}"
        if "eval_loss" in logs:
            found["eval_loss"] = f"held-out loss {float(logs['eval_loss']):.3f}"
        for axis, name in LOGGED.items():
            if name in logs:
                found[name] = f"{logs[name]:,} {AXES[axis].label} active"
        self._figures |= found
        self._noted |= dict.fromkeys(found, self.step)

    def text(self) -> str:
        """Return the training's state in one line, with the figures that were logged last."""
        return self._line(self._figures.values())

    def line(self) -> str:
        """Return the training's state in one line, with the figures of this step alone."""
        return self._line(self._figures[name] for name in self._figures if self._noted[name] == self.step)

    def _line(self, figures: Iterable[str]) -> str:
        if not self._ends:
            return super().text()
        parts = [f"{self.title}: step {self.step:,} of {self._last:,}"]
        if self._left is not None:  # first, since a narrow terminal cuts off what stands at the end
            then, seconds = self._left
            parts.append(f"{clock(max(0.0, seconds - (time.monotonic() - then)))} left")
        parts += figures
        if self.num_scored:
            parts.append(f"scoring held-out rows ({self.num_scored:,} batches)")
        return ", ".join(parts)
