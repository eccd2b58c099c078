"""Measure two models in turns, setting by setting; what cannot be measured becomes a row that says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from pat.benchmark.options import FEWEST_REPETITIONS, BenchmarkOptions
from pat.benchmark.statistics import Spread, paired_ratios, spread_of

ROLES = ("baseline", "model")

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

Status = Literal["ok", "out_of_memory", "too_long"]


class Asked(Protocol):
    """What answers requests: a `Worker`, or a stand-in for it."""

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer, see `Worker.ask`."""
        ...


@dataclass(frozen=True)
class Measurement:
    """One phase of one model at one setting."""

    status: Status = "ok"
    detail: str = ""
    """Why there are no figures."""
    seconds: tuple[float, ...] = ()
    """Of every repetition: the whole batch read, or all new tokens generated."""
    cpu_seconds: tuple[float, ...] = ()
    """Of all threads of the process; on a CPU that other programs use as well, less noisy than seconds."""
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    """Held by the cache at the end of generation."""

    @property
    def spread(self) -> Spread | None:
        """Median and quartiles of the seconds."""
        return spread_of(self.seconds) if self.status == "ok" else None

    def failed(self, status: Status, detail: str) -> Measurement:
        """Return what is left when it could not be done to the end."""
        return Measurement(status, detail)

    def with_answer(self, answer: Mapping[str, Any]) -> Measurement:
        """Return the measurement with one more repetition."""
        peaks = [peak for peak in (self.peak_bytes, answer["peak_bytes"]) if peak is not None]
        return replace(
            self,
            seconds=(*self.seconds, answer["seconds"]),
            cpu_seconds=(*self.cpu_seconds, answer["cpu_seconds"]),
            peak_bytes=max(peaks, default=None),
            cache_bytes=answer.get("cache_bytes"),
        )


@dataclass(frozen=True)
class Row:
    """Both models in one phase at one setting."""

    phase: Phase
    batch_size: int
    context: int
    results: dict[str, Measurement]
    """By `ROLES`."""

    @property
    def speedup(self) -> Spread | None:
        """Seconds of the baseline over the model's; None if one of them has none."""
        return self._ratio(lambda result: result.seconds)

    @property
    def cpu_speedup(self) -> Spread | None:
        """The same of CPU seconds, which says something where the CPU does the work."""
        return self._ratio(lambda result: result.cpu_seconds)

    def _ratio(self, seconds: Callable[[Measurement], Sequence[float]]) -> Spread | None:
        results = [self.results[role] for role in ROLES]
        if any(result.status != "ok" for result in results):
            return None
        return paired_ratios(*map(seconds, results))


Progress = Callable[[int, int], None]
"""Told how many settings are done, and of how many."""


@dataclass
class _Limits:
    """What a model is known not to do."""

    max_positions: int | None
    failures: list[tuple[Phase, int, int]] = field(default_factory=list)
    """(phase, batch size, context) at which memory ran out."""

    def before_trying(self, phase: Phase, batch_size: int, context: int, new_tokens: int) -> Measurement:
        needed = context if phase == "prefill" else context + new_tokens
        if self.max_positions is not None and needed > self.max_positions:
            detail = f"needs {needed} positions, the model has {self.max_positions} (max_position_embeddings)"
            return Measurement("too_long", detail)
        for failed_phase, size, length in self.failures:
            # Generation starts with reading; trying more of what the system kills a process for helps nobody.
            if failed_phase in ("prefill", phase) and batch_size >= size and context >= length:
                return Measurement("out_of_memory", f"larger than batch {size}, context {length}, so not tried")
        return Measurement()


def measure(
    workers: Mapping[str, Asked],
    options: BenchmarkOptions,
    *,
    max_positions: Mapping[str, int | None],
    progress: Progress = lambda done, total: None,
) -> list[Row]:
    """Measure both models at every setting, taking turns: baseline, model, model, baseline, and again.

    Args:
        workers: what answers for each of `ROLES`.
        options: settings, warm-up and repetitions.
        max_positions: longest sequence that each model is made for.
        progress: called after every setting.

    Returns:
        A row for each phase and setting, contexts outermost. A setting for which memory does not suffice has a row as
        well, and so have larger ones, which are not tried.
    """
    limits = {role: _Limits(max_positions[role]) for role in ROLES}
    settings = [(context, size) for context in options.contexts for size in options.batch_sizes]
    rows: list[Row] = []
    for done, (context, batch_size) in enumerate(settings, start=1):
        rows += _measure_setting(workers, options, limits, batch_size, context)
        progress(done, len(settings))
    return rows


def _measure_setting(
    workers: Mapping[str, Asked],
    options: BenchmarkOptions,
    limits: Mapping[str, _Limits],
    batch_size: int,
    context: int,
) -> list[Row]:
    phases = PHASES if options.new_tokens else PHASES[:1]
    results = {
        phase: {role: limits[role].before_trying(phase, batch_size, context, options.new_tokens) for role in ROLES}
        for phase in phases
    }
    start = time.monotonic()
    for repetition in range(options.warmup + options.repetitions):
        late = options.max_seconds is not None and time.monotonic() - start > options.max_seconds
        if late and repetition >= options.warmup + FEWEST_REPETITIONS:
            break
        for role in ROLES if repetition % 2 == 0 else reversed(ROLES):
            for phase in phases:
                before = results[phase][role]
                if before.status != "ok":
                    break  # nor can what comes after it
                if phase == "prefill":
                    keep = "decode" in results and results["decode"][role].status == "ok"
                    answer = workers[role].ask(
                        "prefill", batch_size=batch_size, context=context, seed=repetition, keep=keep
                    )
                else:
                    answer = workers[role].ask("decode", new_tokens=options.new_tokens)
                if "error" in answer:
                    limits[role].failures.append((phase, batch_size, context))
                    for later in phases[phases.index(phase) :]:
                        results[later][role] = before.failed("out_of_memory", answer["message"])
                elif repetition >= options.warmup:
                    results[phase][role] = before.with_answer(answer)
    for role in ROLES:
        if results["prefill"][role].status == "ok":
            workers[role].ask("release")
    return [Row(phase, batch_size, context, results[phase]) for phase in phases]
