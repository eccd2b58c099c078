"""Progress bars: our own, and those of `datasets`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called after every part with (parts done, parts in all)."""

SECONDS_BETWEEN_LINES = 5
"""Of progress, where there is no terminal to draw a bar on."""


@contextmanager
def progress_bar(title: str, unit: str, *, shown: bool = True) -> Iterator[Progress]:
    """Yield a function that moves a bar on stderr; it is drawn if a person is looking."""
    with tqdm(desc=title, unit=unit, disable=None if shown else True, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


class Phase:
    """Work whose end is not known by the one who does it: how much of it is done."""

    def __init__(self) -> None:
        self.done = 0


@contextmanager
def phase(
    title: str, unit: str, *, total: int | None = None, shown: bool = True, count: Callable[[], int] | None = None
) -> Iterator[Phase]:
    """Show every second how much is done, from another thread: a bar on a terminal, else a line now and then.

    A phase that is over within a second is not spoken of, but on a terminal.

    Args:
        title: what is done, as in `Reading data.jsonl`.
        unit: what is counted.
        total: how many there are, if that is known.
        shown: whether anything is to be shown.
        count: returns how many are done, if not the one who does it says so in `Phase.done`.
    """
    state, over = Phase(), threading.Event()
    done = count or (lambda: state.done)
    is_seen = sys.stderr.isatty()

    def show() -> None:
        with tqdm(desc=title, unit=unit, total=total, disable=not is_seen, leave=False) as bar:
            said = -1.0 * SECONDS_BETWEEN_LINES
            while not over.wait(1.0):
                bar.update(done() - bar.n)
                if not is_seen and time.monotonic() - started - said >= SECONDS_BETWEEN_LINES:
                    said = time.monotonic() - started
                    of_all = "" if total is None else f" of {total:,}"
                    so_far = f": {num_done:,}{of_all} {unit}s" if (num_done := done()) else ""
                    print(f"{title}{so_far}", file=sys.stderr, flush=True)

    started = time.monotonic()
    thread = threading.Thread(target=show, daemon=True)
    if shown:
        thread.start()
    try:
        yield state
    finally:
        over.set()
        if shown:
            thread.join()


@contextmanager
def bars_of_datasets(*, shown: bool = True) -> Iterator[None]:
    """Have `datasets` draw its bars only if a person is looking, and not if they are not to be shown."""
    import datasets

    hide = not (shown and sys.stderr.isatty()) and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
