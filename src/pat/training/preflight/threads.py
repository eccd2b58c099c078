"""Choose the number of threads of training on a CPU: torch's, or fewer where a measurement shows that they are faster.

Threads wait for one another at the end of every operation. Where other programs use the same cores, or two cores are
one in truth, that waiting can take many times as long as the work.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu
from trl import SFTConfig

from pat import ranks
from pat.families import Family
from pat.report.progress import phase
from pat.training.preflight.check import Checked
from pat.training.run.run_file import RunFile

logger = logging.getLogger(__name__)

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user chooses the number."""

LEAST_GAIN = 1.2
"""Speed-up from which on fewer threads are taken; below it the noise of the measurement would decide."""

SECONDS = 0.5
"""Time for the rounds of the two numbers that are compared; the sweep before them takes about half as much."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 15

_LARGEST = (768, 2048)
"""Sizes beyond which the answer no longer changes, and only takes longer."""

_NUM_TOKENS = 64


@dataclass(frozen=True)
class Threads:
    """A number of threads that was chosen: by measurement, or since the run began with it."""

    number: int
    default: int
    """Number that torch had before."""
    gain: float | None
    """How many times as fast the chosen number was; None where it was not measured, since the run began with it."""

    def describe(self) -> str:
        """Say what was chosen, and why if it is not what torch had."""
        said = f"{self.number} thread{'' if self.number == 1 else 's'}"
        if self.number == self.default:
            return said
        if self.gain is None:
            return f"{said} (as it began)"
        times = f"{self.gain:.{0 if self.gain >= 10 else 1}f} times"
        return (
            f"{said} ({times} as fast as {self.default} on this CPU: threads wait for one another where other programs "
            "use it)"
        )


def choose_threads(sft: SFTConfig, checked: Checked, known: int | None = None) -> Threads | None:
    """Have torch use the number of threads that training is fastest with on this CPU, see `measure_threads`.

    Args:
        sft: arguments of the trainer.
        checked: what was found out about the run: configuration and family of its base.
        known: number that the run began with, which it keeps where there are as many: sums by another number differ in
            their last digits.

    Returns:
        None where nothing is changed: also on an accelerator, and in several processes, each of which has its number
        from the launcher.
    """
    if sft.device.type != "cpu" or ranks.num_processes() > 1:
        return None
    default = torch.get_num_threads()
    if known is not None and 1 <= known <= default and not chosen_by_user():
        torch.set_num_threads(int(known))
        return Threads(int(known), default, None)
    threads = threads_for(checked.base_config, checked.family, bf16=bool(sft.bf16))
    if threads is not None:
        torch.set_num_threads(threads.number)
    return threads


def threads_for(config: Any, family: Family, *, bf16: bool = False) -> Threads | None:
    """Return the number of threads that work of a model's size is fastest with on this CPU, see `measure_threads`.

    Args:
        config: of the model.
        family: of the model.
        bf16: whether the work is done under bf16 autocast.
    """
    text = config.get_text_config()
    width = int(getattr(text, family.hidden_size_field))
    with phase("Measuring how many threads are fastest on this CPU"):
        return measure_threads(width, int(getattr(text, "intermediate_size", None) or width), bf16=bf16)


def chosen_by_user() -> bool:
    """Tell whether the environment says how many threads are wanted."""
    return any(os.environ.get(name, "").strip() for name in VARIABLES)


def measure_threads(hidden_size: int, intermediate_size: int, *, bf16: bool = False) -> Threads | None:
    """Return the number of threads that a short piece of training work is fastest with; takes about a second.

    torch's own number is as it was afterwards.

    Args:
        hidden_size: number of channels of the model.
        intermediate_size: number of channels of its MLPs.
        bf16: whether training runs under bf16 autocast.

    Returns:
        None where there is nothing to choose: the environment says it, or there is only one thread.
    """
    default = torch.get_num_threads()
    if chosen_by_user() or default < 2:
        return None
    work = _work(min(hidden_size, _LARGEST[0]), min(intermediate_size, _LARGEST[1]), bf16)

    def seconds(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        work()  # starts the threads
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    with restored_threads():
        return fastest(seconds, default)


def fastest(seconds: Callable[[int], float], default: int) -> Threads:
    """Return the default number of threads, or a smaller one that is clearly faster.

    All numbers, halved from the default down to one, are tried once; the best of the smaller ones and the default then
    take turns, and their medians decide.

    Args:
        seconds: does the work with a number of threads, and returns the seconds that it took.
        default: number of threads that are there.
    """
    fewer = [default >> shift for shift in range(1, default.bit_length())]
    seconds(default)  # what is done first allocates, and compiles kernels
    sweep = {number: seconds(number) for number in (default, *fewer)}
    best = min(fewer, key=sweep.__getitem__)
    found: dict[int, list[float]] = {default: [], best: []}
    spent = 0.0
    for round_index in range(MOST_ROUNDS):
        # In both orders, so that what a round begins with is an advantage to neither.
        for number in (default, best) if round_index % 2 else (best, default):
            found[number].append(seconds(number))
            spent += 2 * found[number][-1]  # done once before, to start the threads
        if round_index + 1 >= LEAST_ROUNDS and spent > SECONDS:
            break
    gain = median(found[default]) / median(found[best])
    return Threads(best, default, gain) if gain >= LEAST_GAIN else Threads(default, default, 1.0)


@contextmanager
def restored_threads() -> Iterator[None]:
    """Have torch use the number of threads afterwards that it used before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def remember_threads(run: RunFile, sft: SFTConfig) -> RunFile:
    """Return a run's description with the number of threads that it goes on with; say so if that is another one.

    Args:
        run: description of the run.
        sft: arguments of the trainer. On an accelerator, and in several processes, no number is remembered.
    """
    if sft.device.type != "cpu" or ranks.num_processes() > 1:
        return run.with_threads(None)
    number = torch.get_num_threads()
    if run.num_threads not in (None, number):
        logger.warning(
            "The run goes on with %d threads after %s, so that the last digits of its figures may be other ones; "
            "OMP_NUM_THREADS sets the number.",
            number,
            run.num_threads,
        )
    return run.with_threads(number)


@contextmanager
def using(threads: Threads | None) -> Iterator[None]:
    """Have torch use a number of threads meanwhile; None changes nothing."""
    with restored_threads():
        if threads is not None:
            torch.set_num_threads(threads.number)
        yield


def _work(hidden_size: int, intermediate_size: int, bf16: bool) -> Callable[[], None]:
    """Return a function that goes through an MLP with its norm, there and back."""
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    up, gate = (torch.randn(intermediate_size, hidden_size, generator=generator) for _ in range(2))
    down = torch.randn(hidden_size, intermediate_size, generator=generator)
    tokens = torch.randn(_NUM_TOKENS, hidden_size, generator=generator).requires_grad_()

    def loss() -> Tensor:
        states = rms_norm(tokens, (hidden_size,))
        return (tokens + (silu(states @ gate.T) * (states @ up.T)) @ down.T).float().logsumexp(-1).mean()

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        tokens.grad = None

    return work
