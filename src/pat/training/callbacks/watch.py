"""What is seen of a training while it runs: the step, the loss, what the gates have left, and the time to go."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from pat.report.progress import Phase, clock, during, is_drawn
from pat.shape import AXES
from pat.training.callbacks.callback import LOGGED

SECONDS_WITHOUT_A_LINE = 30
"""Seconds after which a step's end is told of where there is no live line, if the trainer has logged nothing."""

LEAST_STEPS_LATELY, SHARE_LATELY = 10, 0.05
"""Steps whose mean tells what those to come will take: the last ten, or the last twentieth of a long training, where
more of them make the time left calmer. A slow spell is forgotten once it lies so many steps back."""


class Watch(TrainerCallback):
    """Shows one training on the live line or, where there is none, in a line for each log and at least twice a minute.

    Without a live line a step has at most one line, which has only the figures of that step: where the step is logged,
    or held-out rows are scored after it, the line waits for them.

    It takes the place of the trainer's own bar and printer, and has to come after `PatCallback`, which puts the number
    of active channels into the logs.
    """

    def __init__(self, title: str) -> None:
        self._seen = _Training(title)
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

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the step; a trainer that logs seldom does not look as if it hung."""
        self._seen.end(state)
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
        self._began: float | None = None
        """When the last step began."""
        self._ended: float | None = None
        """When the last step ended."""
        self._lately: deque[float] = deque()
        """Seconds of the last steps."""
        self._seconds_between = 0.0
        """Seconds between all steps so far, for scoring, saving and reading data."""
        self._num_between = 0
        self._left: tuple[float, float] | None = None
        """Seconds that were left at a time."""
        self._figures: dict[str, str] = {}
        self._noted: dict[str, int] = {}
        """The step at whose end each figure was logged."""

    def begin(self, state: TrainerState) -> None:
        """Begin a step."""
        self.num_scored, now = 0, time.monotonic()
        if self._began is None:
            self.step, self._last = state.global_step, state.max_steps
            self._lately = deque(maxlen=max(LEAST_STEPS_LATELY, round(SHARE_LATELY * self._last)))
        if self._ended is not None:
            self._seconds_between += now - self._ended
            self._num_between += 1
        self._began = now

    def end(self, state: TrainerState) -> None:
        """End a step."""
        self.step, now = state.global_step, time.monotonic()
        if self._began is None:
            return
        self._lately.append(now - self._began)
        self._ended = now
        # What comes now and then between steps is a mean over all of them, or it would come and go with the last ones.
        each = fmean(self._lately)
        if self._num_between:
            each += self._seconds_between / self._num_between
        self._left = now, each * (self._last - self.step)

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
        if self._began is None:
            return super().text()
        parts = [f"{self.title}: step {self.step:,} of {self._last:,}"]
        if self._left is not None:  # first, since a narrow terminal cuts off what stands at the end
            then, seconds = self._left
            parts.append(f"{clock(max(0.0, seconds - (time.monotonic() - then)))} left")
        parts += figures
        if self.num_scored:
            parts.append(f"scoring held-out rows ({self.num_scored:,} batches)")
        return ", ".join(parts)
