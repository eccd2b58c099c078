"""Seconds of a run over all its sittings: one that was interrupted and gone on with has several."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pat import ranks
from pat.whole_files import write_whole

logger = logging.getLogger(__name__)

SECONDS = "seconds.json"
"""File beside each checkpoint with the seconds that the run had taken by then. Who goes on from it adds to them, so
that what was done after it, and is done again, counts once."""


class Clock:
    """Seconds that each part of a training takes, those of earlier sittings included."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """Add what a part has taken."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def go_on(self, checkpoint: str | None) -> None:
        """Add what a run had taken by the checkpoint that it goes on from; a warning says so if that is not known."""
        if checkpoint is None:
            return
        try:
            stored = json.loads((Path(checkpoint) / SECONDS).read_text(encoding="utf-8"))
            earlier = {str(part): float(seconds) for part, seconds in stored.items()}
            if not all(0 <= seconds < math.inf for seconds in earlier.values()):
                raise ValueError("no time")
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            logger.warning(
                "%s does not say in a %s how long the run had taken by then; its timings are of what follows.",
                checkpoint,
                SECONDS,
            )
            return
        for part, seconds in earlier.items():
            self.add(part, seconds)

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


def write_seconds(checkpoint: Path, seconds: Mapping[str, float]) -> None:
    """Write beside a checkpoint what each part of the run has taken by then."""
    write_whole(checkpoint / SECONDS, json.dumps(dict(seconds), indent=2) + "\n")


class SaveSeconds(TrainerCallback):
    """Writes beside every checkpoint, in the first process, what the run has taken by then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write it."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        ranks.first_alone(lambda: write_seconds(folder, self._clock.seconds()))
