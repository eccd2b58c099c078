"""Progress bars: our own, and those of `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called after every part with (parts done, parts in all)."""


@contextmanager
def progress_bar(title: str, unit: str, *, shown: bool = True) -> Iterator[Progress]:
    """Yield a function that moves a bar on stderr; it is drawn if a person is looking."""
    with tqdm(desc=title, unit=unit, disable=None if shown else True, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


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
