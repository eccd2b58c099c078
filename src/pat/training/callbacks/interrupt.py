"""SIGTERM and SIGINT end a training after its step, with a checkpoint that the same command goes on from."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from pat import ranks
from pat.errors import Interrupted
from pat.report.progress import is_live

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Has a trainer save and stop when one of `SIGNALS` has come; the second one does what it always does, at once."""

    def __init__(self, same_command: str = "the same command") -> None:
        """Make it; `same_command` is what goes on with the run."""
        self.same_command = same_command
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._has_saved = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, stop and log (the loss since the last log would be lost), if any process has got a signal."""
        if number := ranks.largest(self.received or 0):
            self.received = signal.Signals(number)
            args.save_only_model, self._has_saved = False, True
            control.should_save = control.should_training_stop = control.should_log = True

    @contextmanager
    def listening(self, trainer: Trainer) -> Iterator[None]:
        """Take the signals while a trainer trains.

        Raises:
            Interrupted: one has come, and the checkpoint is written.
        """
        # Python delivers signals to the main thread alone. One that is ignored, as under nohup, stays so.
        taken = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.getsignal(number) for number in taken}
        self._before = {number: handler for number, handler in self._before.items() if handler != signal.SIG_IGN}
        try:
            for number in self._before:
                signal.signal(number, self._receive)
            yield
        finally:
            for number in self._before:
                self._restore(number)
        if self.received is not None and not self._has_saved:  # it came after the last step
            signal.raise_signal(self.received)
        if self.received is not None:
            raise Interrupted(
                f"{self.received.name} has stopped the run after step {trainer.state.global_step:,} of "
                f"{trainer.state.max_steps:,}, with a checkpoint; {self.same_command} goes on from there.",
                self.received,
            )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore(number)
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number)
        if not ranks.is_first():
            return
        line = "\n" if is_live() else ""  # behind what the live line says
        line += f"{self.received.name}: stopping after this step, with a checkpoint; a second one stops at once.\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())  # a handler may not enter `print`

    def _restore(self, number: int) -> None:
        handler = self._before.get(number)
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
