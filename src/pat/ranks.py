"""The processes of one run: who is the first, what it alone does, and how the others learn what came of it.

Everything here is for as many processes as there are; with one it does nothing. Files are written, figures measured
and lines printed by the first process. What it decides, and what goes wrong there, is told to the others, so that
nobody waits for a process that has given up (docs/adr/0022).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar, cast

from pat.errors import FailedElsewhere, PatError, one_line

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the first one, which may measure or merge a large model. A process that has died is
noticed at once, by its closed connection."""

SECONDS_BEFORE_SPEAKING = 10.0
"""How long a process other than the first keeps an error to itself: the first one has most likely met the same, says
it, and its end ends the others."""

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")

_control: Any = None


def num_processes() -> int:
    """Return the number of processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def is_first() -> bool:
    """Tell whether this is the first process, or the only one."""
    return rank() == 0


def connected() -> bool:
    """Tell whether there are several processes that can talk to each other, whoever has started them."""
    distributed: Any = sys.modules.get("torch.distributed")  # who has connected them has imported it
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return bool(distributed.get_world_size() > 1)


def meet() -> None:
    """Open a channel of words between the processes, which are connected; all have to come.

    Raises:
        PatError: there are several processes by name that are not connected, each of which would be a run of its own.
    """
    global _control
    if num_processes() > 1 and not connected():
        raise PatError(
            f"Got WORLD_SIZE={num_processes()}, but the processes are not connected; expected a launcher that sets "
            "LOCAL_RANK as well: `pat launch`, `accelerate launch` or torchrun."
        )
    if _control is None and connected():
        from torch import distributed

        # Over sockets, whatever the tensors travel by: words need no GPU, and patience is no business of a kernel.
        _control = distributed.new_group(backend="gloo", timeout=PATIENCE)


def first(function: Callable[[], T]) -> T:
    """Have the first process do something, while the others wait, and return what came of it in all of them.

    Raises:
        FailedElsewhere: in the other processes, if the first one raised an error, which it goes on with itself.
    """
    if _control is None:
        return function()
    from torch import distributed

    told: list[Any] = [None]
    if not is_first():
        distributed.broadcast_object_list(told, src=0, group=_control, device=cast(Any, "cpu"))
        if isinstance(told[0], FailedElsewhere):
            raise told[0]
        return cast(T, told[0])
    try:
        result = function()
    except BaseException as error:
        status = error.exit_status if isinstance(error, PatError) else 1
        told = [FailedElsewhere(one_line(error), status)]
        distributed.broadcast_object_list(told, src=0, group=_control, device=cast(Any, "cpu"))
        raise
    distributed.broadcast_object_list([result], src=0, group=_control, device=cast(Any, "cpu"))
    return result


def first_alone(function: Callable[[], Any]) -> None:
    """Have the first process do something whose outcome is of no use to the others, which wait."""

    def silently() -> None:
        function()

    first(silently)


def first_then_others(function: Callable[[], T]) -> T:
    """Have every process do the same, the first one before the others, which then find its caches.

    Raises:
        FailedElsewhere: in the other processes, if the first one raised an error.
    """
    results: list[T] = []
    first_alone(lambda: results.append(function()))
    return results[0] if results else function()


def largest(number: int) -> int:
    """Return the largest of the numbers that the processes have."""
    if _control is None:
        return number
    import torch
    from torch import distributed

    told = torch.tensor(number)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=_control)
    return int(told)


def wait() -> None:
    """Wait until every process has come here."""
    largest(0)


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Keep the other processes from printing: what they would say, the first one says."""
    if is_first():
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def speaks(error: BaseException) -> bool:
    """Tell whether this process is to print an error; one that is not the first waits before it answers.

    What has ended the first process is printed there. What ends another one alone, it says itself.
    """
    if is_first():
        return True
    time.sleep(SECONDS_BEFORE_SPEAKING)
    return not isinstance(error, FailedElsewhere) and not lost(error)


def lost(error: BaseException) -> bool:
    """Tell whether an error says no more than that another process is gone."""
    return num_processes() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
