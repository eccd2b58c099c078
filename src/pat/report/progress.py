"""How far a command is: one live line on a terminal, plain lines now and then where there is none.

Whatever takes longer than a moment is a phase. Phases may lie within each other; the one that began last is what the
live line tells of. It is drawn by rich, above which everything else that is printed meanwhile appears; at the end
of the outermost phase it leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called after every part with (parts done, parts in all)."""

SECONDS_BETWEEN_LINES = 5
"""Seconds between two lines of progress, where there is no terminal to draw a live line on."""

REFRESHES_PER_SECOND = 4

LOGGERS = (None, "transformers", "datasets", "huggingface_hub")
"""Loggers that may have handlers of their own, which remember the terminal as it was before there was a live line."""

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)
_lock = threading.RLock()
_open: list[Phase] = []
_live: list[Callable[[], None]] = []
"""The function that takes the live line away; empty while there is none."""


class Phase:
    """Work that takes time, and how much of it is done."""

    def __init__(
        self, title: str, unit: str = "", total: int | None = None, count: Callable[[], int] | None = None
    ) -> None:
        self.title, self.unit, self.total, self.done = title, unit, total, 0
        self.is_most = False
        """Whether `total` is how many there are at most."""
        self.share: float | None = None
        """Share of the work that is done, where parts take more or less of it; None where all take as much."""
        self._expected = 0.0
        """Number of seconds that the work was expected to take before it began; 0 where nothing was expected."""
        self._count, self._started = count, time.monotonic()
        self._known = (0, 0.0)
        """How many were done when that last changed, and the seconds that had passed."""

    def text(self) -> str:
        """Return what it is, how far it is, and the time that is left or, if that is not known, has passed."""
        passed = time.monotonic() - self._started
        done = self.done if self._count is None else self._count()
        if done != self._known[0]:
            self._known = done, passed
        if self.unit and self.total is None and not done:
            return f"{self.title}, {clock(passed)}"
        so_far = f"{self.title}: {done:,}" if self.unit else self.title
        if self.total is not None:
            so_far += f" of {'up to ' if self.is_most else ''}{self.total:,}"
        so_far += f" {self.unit}" if self.unit else ""
        if self.total and (done or self._expected):
            then, share = self._known[1], self.share or done / self.total
            # What was expected counts as much as is left: a first small part tells little of the others.
            whole = then + (1 - share) * self._expected if self._expected else then / share
            left = clock(max(0.0, whole * (1 - share) - (passed - then)))
            return f"{so_far}, {'at most ' if self.is_most else ''}{left} left"
        return f"{so_far}, {clock(passed)}"

    def expect(self, seconds: float) -> None:
        """Start the clock; the work is expected to take about this many seconds."""
        self._expected, self._started, self._known = seconds, time.monotonic(), (0, 0.0)

    def over(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield parts, counting those that are done; time counts from the first, before which others may be at work."""
        for number, part in enumerate(parts):
            if number == 0:
                self._started = time.monotonic()
            yield part
            self.done += 1

    def line(self) -> str:
        """Return what is said of it where there is no live line."""
        return self.text()


@contextmanager
def phase(
    title: str, unit: str = "", *, total: int | None = None, shown: bool = True, count: Callable[[], int] | None = None
) -> Iterator[Phase]:
    """Show how much is done: live on a terminal, else by a line every few seconds if it takes longer than one.

    Args:
        title: what is done, as in `Reading data.jsonl`.
        unit: what is counted, in the plural; empty if nothing is.
        total: how many there are, if that is known.
        shown: whether anything is to be shown.
        count: returns how many are done, if not the one who does it says so in `Phase.done`.
    """
    state = Phase(title, unit, total, count)
    with during(state, shown=shown, says_lines=True):
        yield state


@contextmanager
def during(state: Phase, *, shown: bool = True, says_lines: bool = False) -> Iterator[None]:
    """Have the live line tell of a phase; where there is none, print its line now and then if that is wanted."""
    if not shown or _hidden.get():
        yield
        return
    over, thread = threading.Event(), None
    with _lock:
        _open.append(state)
        if not _live and is_live():
            _live.append(_draw())
    if says_lines and not is_live():
        thread = threading.Thread(target=_say, args=(state, over), daemon=True)
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join()
        with _lock:
            _open.remove(state)
            if not _open:
                while _live:
                    _live.pop()()


@contextmanager
def progress_bar(title: str, unit: str, *, shown: bool = True) -> Iterator[Progress]:
    """Yield a function that is told how many parts are done, and of how many."""
    with phase(title, unit, shown=shown) as state:

        def advance(done: int, total: int) -> None:
            state.done, state.total = done, total

        yield advance


@contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """Show no phase that begins meanwhile, if so wanted."""
    token = _hidden.set(hide or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


def say(line: str) -> None:
    """Print a line on stderr where there is no live line, and where phases are shown."""
    if not _hidden.get() and not is_live():
        print(line, file=sys.stderr, flush=True)


def current() -> str:
    """Return what the live line says, or would say; empty between phases."""
    with _lock:
        return _open[-1].text() if _open else ""


def is_live() -> bool:
    """Tell whether a person is looking at a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def is_drawn() -> bool:
    """Tell whether a live line tells of what is done now."""
    return bool(_live)


def clock(seconds: float, *, hours: bool = False) -> str:
    """Return a duration as `1:02` minutes and seconds, or `1:02:03` from an hour on, or where `hours` asks for it."""
    minutes, rest = divmod(round(seconds), 60)
    whole_hours, minutes = divmod(minutes, 60)
    return f"{whole_hours}:{minutes:02}:{rest:02}" if whole_hours or hours else f"{minutes}:{rest:02}"


def _say(state: Phase, over: threading.Event) -> None:
    wait = 1.0
    while not over.wait(wait):
        wait = SECONDS_BETWEEN_LINES
        with _lock:
            is_innermost = _open[-1] is state
        if is_innermost:
            print(state.line(), file=sys.stderr, flush=True)


def _draw() -> Callable[[], None]:
    """Draw the live line until what is returned is called."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    live = Live(
        get_renderable=lambda: Text(current(), no_wrap=True, overflow="ellipsis"),
        console=Console(stderr=True, force_jupyter=False),
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    terminal = sys.stderr
    live.start(refresh=True)
    redirected = sys.stderr
    _redirect(terminal, redirected)

    def stop() -> None:
        live.stop()
        _redirect(redirected, terminal)  # handlers of libraries that were imported meanwhile, too

    return stop


def _redirect(before: TextIO, after: TextIO) -> None:
    for handler in (handler for name in LOGGERS for handler in logging.getLogger(name).handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)


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


@contextmanager
def quiet_transformers(quiet: bool = True) -> Iterator[None]:
    """Keep transformers from drawing bars, if so wanted, and leave its setting as it was; downloads go on to draw."""
    import huggingface_hub.utils
    import transformers.utils.logging

    shown: Any = transformers.utils.logging
    hub: Any = huggingface_hub.utils
    before = shown.is_progress_bar_enabled()
    if quiet:
        downloads_shown = not hub.are_progress_bars_disabled()
        shown.disable_progress_bar()
        if downloads_shown and sys.stderr.isatty():
            hub.enable_progress_bars()
    try:
        yield
    finally:
        if before:
            shown.enable_progress_bar()
