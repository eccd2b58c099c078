"""Seconds of a run over all its sittings: one that was interrupted and gone on with has several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from pat import ranks


class Clock:
    """Seconds that each part of a training takes, those of earlier sittings included."""

    def __init__(self, earlier: Mapping[str, float]) -> None:
        self._seconds = dict(earlier)
        self._begun: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """Add what a part has taken in this sitting."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add what is done meanwhile to a part, unless it fails."""
        self._begun[part] = time.perf_counter()
        try:
            yield
            self.add(part, time.perf_counter() - self._begun[part])
        finally:
            del self._begun[part]

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part up to now."""
        now = time.perf_counter()
        running = {part: self._seconds.get(part, 0.0) + now - begun for part, begun in self._begun.items()}
        return self._seconds | running


class AtEachCheckpoint(TrainerCallback):
    """Does something when a checkpoint has been written, in the first process."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do it."""
        ranks.first_alone(self._action)
